"""Shapes of the kernel benchmarks: output heads of Qwen2.5 under tensor parallelism, and token counts of a
step."""

from typing import NamedTuple


class Shape(NamedTuple):
    """An output head on one rank: N tokens, hidden size H, V columns of this rank, and the share of trained
    tokens."""

    name: str
    num_tokens: int
    hidden_size: int
    num_columns: int
    live_share: float = 1.0


MODELS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen2.5-72b": (8192, 152064),
}
GOALS = {"qwen2.5-1.5b": 0.45, "qwen2.5-7b": 0.50}  # model FLOPs utilisation of a training step on one H200
TENSOR_PARALLEL = (1, 2, 4, 8)
NUM_TOKENS = (4096, 16384, 49152)
# A step of 16 answers of 3072 tokens. No provider of the head should store all of its logits.
MEMORY_SHAPE = Shape("7B N=49152 TP=1", 49152, 3584, 152064)


def head_shapes(device_type: str, full: bool, tiny: bool = False) -> list[Shape]:
    """Return the shapes for the head with the loss: `shapes` and, on a GPU, the shape of the memory claim."""
    found = shapes(device_type, full, tiny)
    return found if device_type != "cuda" or tiny or MEMORY_SHAPE in found else [*found, MEMORY_SHAPE]


def shapes(device_type: str, full: bool, tiny: bool = False) -> list[Shape]:
    """Return the shapes for a device: on a GPU those of the claims (all shapes with `full`), on a CPU small
    ones; with `tiny`, one that takes no time."""
    if tiny:
        return [Shape("N=64 H=32 V=1024 half", 64, 32, 1024, 0.5)]
    if device_type != "cuda":
        return [
            Shape("N=512 H=256 V=32768", 512, 256, 32768),
            Shape("N=512 H=256 V=32768 half", 512, 256, 32768, 0.5),
        ]
    if not full:
        return [
            Shape("7B N=16384 TP=1", 16384, 3584, 152064),
            Shape("7B N=16384 TP=8", 16384, 3584, 19008),
            Shape("7B N=8192 TP=1 half", 8192, 3584, 152064, 0.5),
        ]
    return [
        Shape(f"{model.removeprefix('qwen2.5-')} N={tokens} TP={ranks}", tokens, hidden, vocab // ranks)
        for model, (hidden, vocab) in MODELS.items()
        for ranks in TENSOR_PARALLEL
        for tokens in NUM_TOKENS
    ]
