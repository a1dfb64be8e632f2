"""Look up model shapes by public name or model folder, and count parameters."""

from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.model.families import FAMILIES
from rlsc_mcore.model.shape import Architecture, read_architecture


def _shape(
    family: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    *,
    tied: bool,
    context: int = 32768,
) -> Architecture:
    return Architecture(
        name=f"{family}ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=context,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        rope_scaling_factor=None,
        tied_embeddings=tied,
        qkv_bias=FAMILIES[f"{family}ForCausalLM"].qkv_bias,
        qk_norm=FAMILIES[f"{family}ForCausalLM"].qk_norm,
    )


# Sizes from the published config.json files; a test checks the number of parameters of each model.
MODELS: dict[str, Architecture] = {
    "qwen2.5-0.5b": _shape("Qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    "qwen2.5-1.5b": _shape("Qwen2", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    "qwen2.5-3b": _shape("Qwen2", 36, 2048, 11008, 16, 2, 128, 151936, tied=True),
    "qwen2.5-7b": _shape("Qwen2", 28, 3584, 18944, 28, 4, 128, 152064, tied=False),
    "qwen2.5-14b": _shape("Qwen2", 48, 5120, 13824, 40, 8, 128, 152064, tied=False),
    "qwen2.5-32b": _shape("Qwen2", 64, 5120, 27648, 40, 8, 128, 152064, tied=False),
    "qwen2.5-72b": _shape("Qwen2", 80, 8192, 29568, 64, 8, 128, 152064, tied=False),
    "qwen2.5-math-1.5b": _shape("Qwen2", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, context=4096),
    "qwen2.5-math-7b": _shape("Qwen2", 28, 3584, 18944, 28, 4, 128, 152064, tied=False, context=4096),
    "qwen2.5-math-72b": _shape("Qwen2", 80, 8192, 29568, 64, 8, 128, 152064, tied=False, context=4096),
    "qwen3-0.6b": _shape("Qwen3", 28, 1024, 3072, 16, 8, 128, 151936, tied=True, context=40960),
    "qwen3-1.7b": _shape("Qwen3", 28, 2048, 6144, 16, 8, 128, 151936, tied=True, context=40960),
    "qwen3-4b": _shape("Qwen3", 36, 2560, 9728, 32, 8, 128, 151936, tied=True, context=40960),
    "qwen3-8b": _shape("Qwen3", 36, 4096, 12288, 32, 8, 128, 151936, tied=False, context=40960),
    "qwen3-14b": _shape("Qwen3", 40, 5120, 17408, 40, 8, 128, 151936, tied=False, context=40960),
    "qwen3-32b": _shape("Qwen3", 64, 5120, 25600, 64, 8, 128, 151936, tied=False, context=40960),
    "llama-3.2-1b": _shape("Llama", 16, 2048, 8192, 32, 8, 64, 128256, tied=True, context=131072),
    "llama-3.2-3b": _shape("Llama", 28, 3072, 8192, 24, 8, 128, 128256, tied=True, context=131072),
    "llama-3.1-8b": _shape("Llama", 32, 4096, 14336, 32, 8, 128, 128256, tied=False, context=131072),
    "llama-3.1-70b": _shape("Llama", 80, 8192, 28672, 64, 8, 128, 128256, tied=False, context=131072),
    "smollm2-135m": _shape("Llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True, context=8192),
    "smollm2-360m": _shape("Llama", 32, 960, 2560, 15, 5, 64, 49152, tied=True, context=8192),
    "smollm2-1.7b": _shape("Llama", 24, 2048, 8192, 32, 32, 64, 49152, tied=True, context=8192),
}


def find_model(name: str) -> Architecture:
    """Return the shape of a model folder, a config.json file, or a public model's name.

    Names ignore case, `owner/` and `-Instruct`. Raises ConfigError that lists the known names.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return read_architecture(path)
    if path.is_file():
        return read_architecture(path.parent, path)
    short = name.rpartition("/")[2].lower().removesuffix("-instruct").removeprefix("meta-")
    if short in MODELS:
        return MODELS[short]
    raise ConfigError(
        f"--model {name}: no such folder, config.json or known name; known names: {', '.join(MODELS)}"
    )


def num_parameters(shape: Architecture, tp: int = 1, *, padded: bool = False) -> int:
    """Count the parameters on one of `tp` ranks; matrices are sharded, norms are replicated.

    `padded` counts the padded vocabulary.
    """
    split, whole = stage_parameters(
        shape, shape.padded_vocab_size(tp) if padded else shape.vocab_size, (shape.num_layers,), 0
    )
    return split // tp + whole


def stage_parameters(
    shape: Architecture, vocabulary_rows: int, stage_layers: Sequence[int], stage: int
) -> tuple[int, int]:
    """Count the parameters of one pipeline stage over all tensor-parallel ranks: (sharded, replicated).

    The last of several stages has its own copy of tied embeddings.
    """
    hidden, queries, keys = (
        shape.hidden_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    split = hidden * (2 * queries + 2 * keys) + 3 * hidden * shape.ffn_hidden_size
    split += queries + 2 * keys if shape.qkv_bias else 0
    whole = 2 * hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    is_first, is_last = stage == 0, stage == len(stage_layers) - 1
    has_head = is_last and not (is_first and shape.tied_embeddings)
    vocabulary = vocabulary_rows * hidden * (is_first + has_head)
    return stage_layers[stage] * split + vocabulary, stage_layers[stage] * whole + hidden * is_last
