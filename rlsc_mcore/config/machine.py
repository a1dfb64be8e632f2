"""Options of the kernels and of what a run records."""

from dataclasses import dataclass
from typing import Literal

from rlsc_mcore.config.errors import check


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """Kernels of the log-prob reduction and the weighted cross-entropy."""

    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    """Kernel implementation. `auto`: the fastest available on this device. `reference`: plain PyTorch. The
    results agree."""

    cpu_products: Literal["auto", "blas", "onednn"] = "auto"
    """Library of the trainer's float32 matrix products on a CPU: torch's BLAS or oneDNN. `auto`: the faster,
    measured with the shapes of the model when the run starts."""

    logits_dtype: Literal["float32", "model"] = "float32"
    """Data type of the logits in scoring, in the loss and in the engine. `float32`: the head multiplies
    operands of `model.dtype` and does not round the logits. `model`: logits of `model.dtype`; in bfloat16 the
    log-probability of a long answer is wrong in its first digits. The engine uses the same type if its vLLM
    supports `head_dtype` for generation, else `model.dtype`."""


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """Files and reports of a run, except checkpoints."""

    tensorboard: bool = True
    """Also write the metrics of metrics.jsonl as TensorBoard events."""
    wandb_project: str | None = None
    """Also log the metrics of metrics.jsonl to this Weights & Biases project (`pip install wandb`;
    WANDB_MODE=offline needs no network). A resumed run continues the same W&B run."""
    mlflow_experiment: str | None = None
    """Also log the metrics of metrics.jsonl to this MLflow experiment (`pip install mlflow`;
    MLFLOW_TRACKING_URI names the server). A resumed run continues the same MLflow run."""
    save_rollouts: bool = True
    """Write every sampled answer to rollouts/step_*.jsonl."""
    max_log_prob_gap: float | None = None
    """Threshold of the mean |trainer - engine| log-prob per token. A step above it counts as mismatched.
    Default: 0.001 in float32, 0.4 in bfloat16. Warnings start below it."""
    max_mismatched_steps: int = 3
    """Stop the run after this many mismatched steps in a row; the last checkpoint is not changed. 0: only
    warn."""

    def __post_init__(self) -> None:
        gap = self.max_log_prob_gap
        check(gap is None or gap > 0, "observability.max_log_prob_gap", "more than 0", gap)
        check(
            self.max_mismatched_steps >= 0,
            "observability.max_mismatched_steps",
            "at least 0",
            self.max_mismatched_steps,
        )
