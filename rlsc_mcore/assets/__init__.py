"""The embedded default model, its tokenizer and its questions."""

# Who writes the answers to each family of questions in the pretraining of `embedded:three_modes`.
THREE_MODES_AUTHORS = {
    "equation": "rare right mode",
    "cost": "rare right mode",
    "boxes": "wrong mode",
    "word": "many wordings",
    "chain": "control",
}
