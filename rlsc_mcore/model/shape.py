"""Read a model's sizes, vocabulary and rotary scaling from a Hugging Face config.json. Imports no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, ParallelConfig
from rlsc_mcore.data.balance import CostModel
from rlsc_mcore.model.families import FAMILIES

# Megatron (for its shards) and vLLM (always) pad the vocabulary to a multiple of this value, so their shards
# match.
VOCABULARY_MULTIPLE = 64

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py")
"""Patterns of the files of a hub model that are downloaded."""


@dataclass(frozen=True)
class Architecture:
    """The properties of a decoder-only model that the trainer and the weight map need."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None  # Llama 3's frequency scaling; None without scaling
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    def kv_bytes_per_token(self, element_bytes: int, tp_size: int) -> int:
        """Return the KV cache bytes per token on one of `tp_size` ranks of an engine."""
        return 2 * self.num_layers * (self.num_kv_heads // tp_size) * self.head_dim * element_bytes

    def cost_model(self) -> CostModel:
        """Return the FLOPs of training: forward plus backward of twice the cost, with 2 m n k per matrix
        product."""
        hidden, queries = self.hidden_size, self.num_heads * self.head_dim
        projections = hidden * (2 * queries + 2 * self.num_kv_heads * self.head_dim)
        return CostModel(
            per_token=6.0 * self.num_layers * (projections + 3 * hidden * self.ffn_hidden_size),
            per_token_pair=12.0 * self.num_layers * queries,
            per_trained_token=6.0 * hidden * self.vocab_size,
        )

    def stage_layers(self, pp: int) -> tuple[int, ...]:
        """Split the layers into `pp` pipeline stages of nearly equal FLOPs; the last stage also has the
        output head.

        The estimate assumes that all tokens are trained, so that the head scores all of them. Every stage
        gets at least one layer if there are enough.
        """
        cost = self.cost_model()
        head = cost.per_trained_token / (cost.per_token / self.num_layers)
        best: tuple[int, ...] = (self.num_layers,)
        if pp > 1:
            # The maximum number of layers for which the last stage is not the slowest; 1 if the head alone is
            # slower.
            fitting = [
                last
                for last in range(1, self.num_layers)
                if last + head <= -(-(self.num_layers - last) // (pp - 1))
            ]
            last = max(fitting, default=1)
            each, more = divmod(self.num_layers - last, pp - 1)
            best = (*(each + (stage >= pp - 1 - more) for stage in range(pp - 1)), last)
        return best

    def padded_vocab_size(self, tp_size: int) -> int:
        """Return the number of embedding rows over all ranks."""
        multiple = math.lcm(VOCABULARY_MULTIPLE, tp_size)
        return -(-self.vocab_size // multiple) * multiple


def read_architecture(folder: Path, file: Path | None = None) -> Architecture:
    """Read `folder`/config.json, or `file`.

    Raises `ConfigError` naming the file and field if the file does not exist, is not JSON, lacks a field or
    requests an unsupported feature (another architecture, sliding windows, an unknown rotary scaling).
    """
    file = file or folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path: {folder} has no config.json; expected a Hugging Face model folder")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(config).__name__}")
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name not in FAMILIES:
        raise ConfigError(
            f"{file}: architectures: {name} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    if config.get("use_sliding_window"):
        raise ConfigError(f"{file}: use_sliding_window: sliding-window attention is not supported")
    family = FAMILIES[name]
    if not family.qkv_bias and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ConfigError(f"{file}: attention_bias, mlp_bias: {name} variants with biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{file}: hidden_act: {config['hidden_act']!r} is not supported; expected 'silu'")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return Architecture(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            rotary_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling_factor=_llama3_factor(rope, file),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )
    except KeyError as error:
        raise ConfigError(f"{file}: missing field {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: a field has a wrong value: {error}") from None


def check_parallel(architecture: Architecture, tp: int, source: Path, option: str = "parallel.tp") -> None:
    """Raise `ConfigError` naming `option` unless attention heads, KV heads and MLP width split evenly over
    `tp` ranks."""
    for field, size in (
        ("num_attention_heads", architecture.num_heads),
        ("num_key_value_heads", architecture.num_kv_heads),
        ("intermediate_size", architecture.ffn_hidden_size),
    ):
        if size % tp:
            raise ConfigError(f"{option}: {tp} does not divide {field} = {size} of {source}")


def check_stages(architecture: Architecture, parallel: ParallelConfig, source: Path) -> None:
    """Raise `ConfigError` unless the number of layers matches the pipeline stages."""
    layers = architecture.num_layers
    if parallel.pp > layers:
        raise ConfigError(
            f"parallel.pp: {parallel.pp} stages, but {source} has {layers} layers; expected at most {layers}"
        )
    if parallel.stage_layers is not None and sum(parallel.stage_layers) != layers:
        given = " + ".join(map(str, parallel.stage_layers))
        raise ConfigError(
            f"parallel.stage_layers: {given} = {sum(parallel.stage_layers)}, but {source} has {layers} layers"
        )


def _llama3_factor(rope: dict[str, Any], file: Path) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{file}: rope_parameters: partial_rotary_factor {rope['partial_rotary_factor']} is not supported"
        )
    if kind == "default":
        return None
    # Megatron-Core accepts only the factor. The other values must be those of the released Llama 3 models.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope.get(name, value) == value for name, value in fixed.items()):
        return float(rope["factor"])
    raise ConfigError(
        f"{file}: rope_parameters: rotary scaling {kind!r} is not supported; expected default or llama3"
    )
