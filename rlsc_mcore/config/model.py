"""Options of the trained model and of its adapters."""

from dataclasses import dataclass
from typing import Literal

from rlsc_mcore.config.errors import check, is_given

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The trained model."""

    path: str
    """Hugging Face folder (config.json, *.safetensors, tokenizer), a hub name, or
    `embedded:tiny_qwen2` or `embedded:three_modes`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the parameters in trainer and engine. bfloat16 keeps float32 master weights."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation. `auto`: TransformerEngine on a GPU with bfloat16 if it imports, else torch SDPA.
    `transformer_engine`: an error if it is not available."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Format of the layers' matrix products in training. `hybrid`: e4m3 forward and e5m2 backward. Needs
    TransformerEngine layers and a GPU of compute capability 8.9 or more. Weights and the engine stay in
    bfloat16."""
    trust_remote_code: bool = False
    """Let the tokenizer's folder run its own Python code. If off, no code of the model folder is executed and
    nothing is unpickled."""

    def __post_init__(self) -> None:
        check(is_given(self.path), "model.path", "a model folder or hub name", self.path)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: only two thin factors per projection are trained, the rest of the model is
    frozen."""

    rank: int = 0
    """Rank r of the adapters; 0: train all weights. Trainer and engine share the merged weights
    W0 + (alpha / r) B A, so the hot swap and the speed of the engine do not change. Needs torch layers, which
    `model.layers auto` then takes."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Projections with an adapter."""
    base_on_host: bool = True
    """Keep the weights before training, from which each update merges, in page-locked host memory. If off,
    they stay on the GPU: one more copy of the target projections there, and faster merges. No effect on a
    CPU."""

    def __post_init__(self) -> None:
        check(self.rank >= 0, "lora.rank", "0 (off) or more", self.rank)
        check(self.alpha > 0, "lora.alpha", "more than 0", self.alpha)
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        fits = bool(self.targets) and not unknown and len(set(self.targets)) == len(self.targets)
        check(fits, "lora.targets", f"different ones of {', '.join(LORA_TARGETS)}", self.targets)

    @property
    def is_on(self) -> bool:
        """Return whether adapters are trained."""
        return self.rank > 0
