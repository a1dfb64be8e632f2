"""Options of the optimizer, of the layout over ranks and of the training loop."""

from dataclasses import dataclass
from typing import Literal

from rlsc_mcore.config.errors import check


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, run by Megatron-Core's optimizer."""

    lr: float = 1e-5
    """Peak learning rate (paper: 1e-5)."""
    beta1: float = 0.9
    """AdamW beta 1 (not stated in the paper; torch's default)."""
    beta2: float = 0.999
    """AdamW beta 2 (not stated in the paper; torch's default)."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay ("standard" in the paper; torch's AdamW default). Biases and norms are not
    decayed."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 turns clipping off (not stated in the paper)."""
    warmup_steps: int = 0
    """Steps of linear warm-up (not stated in the paper)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or decayed until `training.num_steps` to `min_lr`."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    distributed: bool = True
    """Shard optimizer states and float32 master weights over the data-parallel ranks (Megatron's distributed
    optimizer)."""
    precision_aware: bool = False
    """Store Adam's moments in bfloat16, with float32 master weights (TransformerEngine's FusedAdam). Needs a
    GPU and `distributed`."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which gradients are accumulated over micro-batches and reduced over the data-parallel
    ranks. bfloat16 halves gradient memory and traffic, rounds every sum, and needs `model.dtype` bfloat16."""
    cpu_offload: float = 0.0
    """Fraction of the parameters whose optimizer state is kept and updated in host memory: 0 none, 1 all.
    Needs a GPU and `distributed`."""
    offload_during_rollout: bool = False
    """Offload the optimizer state (moments, float32 master weights) to page-locked host memory while the
    engine samples. The freed GPU memory is available to the KV cache. Needs a GPU and costs two copies per
    step; the update runs on the GPU."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer.lr", "more than 0", self.lr)
        check(0 <= self.beta1 < 1, "optimizer.beta1", "in [0, 1)", self.beta1)
        check(0 <= self.beta2 < 1, "optimizer.beta2", "in [0, 1)", self.beta2)
        check(self.eps > 0, "optimizer.eps", "more than 0", self.eps)
        check(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        check(self.clip_grad >= 0, "optimizer.clip_grad", "at least 0", self.clip_grad)
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0", self.warmup_steps)
        check(0 <= self.min_lr <= self.lr, "optimizer.min_lr", "between 0 and optimizer.lr", self.min_lr)
        check(0 <= self.cpu_offload <= 1, "optimizer.cpu_offload", "in [0, 1]", self.cpu_offload)
        check(
            self.distributed or not self.precision_aware,
            "optimizer.precision_aware",
            "optimizer.distributed with it",
            True,
        )
        check(
            self.distributed or not self.cpu_offload,
            "optimizer.cpu_offload",
            "0 without optimizer.distributed",
            self.cpu_offload,
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout; data-parallel size = world size / (tp x pp)."""

    tp: int = 1
    """Tensor-parallel size of the trainer, and of the engines unless `rollout.tp` is set. Sequence
    parallelism is on for tp > 1."""
    pp: int = 1
    """Pipeline-parallel size of the trainer: stages of consecutive layers, run in Megatron's 1F1B schedule.
    Each engine stays tensor-parallel and holds all layers; every hot swap sends it the layers of the other
    stages."""
    stage_layers: tuple[int, ...] | None = None
    """Number of layers of each pipeline stage, first stage first. Default: stages of equal estimated cost,
    including the output head."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks bucket by bucket, during the backward pass of the last
    micro-batch."""
    overlap_param_gather: bool = False
    """All-gather updated parameters bucket by bucket during the next forward pass. Needs
    `overlap_grad_reduce` and `optimizer.distributed`. Helps only if `training.updates_per_rollout` > 1,
    because all parameters are gathered before a hot swap."""
    hang_timeout_s: float = 1200.0
    """Seconds without progress in a phase after which a rank counts as hung (start-up: four times as long).
    The rank that detects it reports which rank hangs and stops the run. A dead rank stops the run after
    RLSC_DEAD_AFTER_S seconds (default 60)."""
    bucket_size: int | None = None
    """Parameters per bucket of `overlap_grad_reduce`. Default: 40 million, or 1 million per rank if that is
    more."""

    def __post_init__(self) -> None:
        check(self.tp >= 1, "parallel.tp", "at least 1", self.tp)
        check(self.pp >= 1, "parallel.pp", "at least 1", self.pp)
        layers = self.stage_layers
        fits = layers is None or (len(layers) == self.pp and min(layers) >= 1)
        check(fits, "parallel.stage_layers", f"parallel.pp = {self.pp} numbers, each at least 1", layers)
        check(self.hang_timeout_s > 0, "parallel.hang_timeout_s", "more than 0", self.hang_timeout_s)
        check(
            self.bucket_size is None or self.bucket_size >= 1,
            "parallel.bucket_size",
            "at least 1",
            self.bucket_size,
        )
        needed = self.overlap_grad_reduce or not self.overlap_param_gather
        check(needed, "parallel.overlap_param_gather", "parallel.overlap_grad_reduce with it", True)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    num_steps: int = 10
    """Number of steps, one batch of rollouts each (paper: 10 or 20)."""
    updates_per_rollout: int = 1
    """Optimizer updates on each batch of rollouts (paper: 1), at the step's learning rate. Each update uses
    the whole batch, with the weights from the policy that sampled it (p_old, from the first pass)."""
    seed: int = 0
    """Random seed of the question order and of every sampled answer."""
    tokens_per_micro_batch: int = 16384
    """Maximum number of packed tokens per forward/backward pass. A longer sequence gets its own pass.
    Gradients do not depend on it."""
    max_skipped_steps: int = 3
    """Save and stop the run after this many skipped steps in a row. A step is skipped if its loss or gradient
    norm is not finite."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, the MLP of each layer (`selective`), or every
    whole layer (`full`). `rlsc plan` shows the memory and time of each."""
    save_every: int = 5
    """Steps between checkpoints. 0: save only at the end and when the run is stopped."""
    keep_last: int = 2
    """Number of checkpoints to keep. Older ones are deleted when the next one is complete."""
    stop_on: tuple[str, ...] = ()
    """Conditions that end the run without labels, each `METRIC<VALUE` or `METRIC>VALUE` of a number in
    metrics.jsonl. A value that ends in `x` is a multiple of the metric at the first step: `mean_length<0.5x`,
    `same_answer_share>0.5`. The run is saved, evaluated and exported; with `keep_best`, from its best
    checkpoint."""
    stop_after: int = 3
    """Steps in a row in which a condition of `stop_on` must hold."""
    keep_best: Literal["none", "f_estimate", "boxed_share", "effective_samples", "agreement"] = "none"
    """Also keep the checkpoint with the highest value of this metric of metrics.jsonl; none of the metrics is
    accuracy. The step after a checkpoint measures it. `checkpoints/best` names it; select it in `rlsc export`
    and `rlsc eval` with `--checkpoint best`."""
    async_save: bool = False
    """Write checkpoints asynchronously, from a copy in host memory. `latest` changes when every rank has
    written its part."""

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, "training.num_steps", "at least 1", self.num_steps)
        check(
            self.updates_per_rollout >= 1,
            "training.updates_per_rollout",
            "at least 1",
            self.updates_per_rollout,
        )
        check(self.seed >= 0, "training.seed", "at least 0", self.seed)
        check(
            self.tokens_per_micro_batch >= 1,
            "training.tokens_per_micro_batch",
            "at least 1",
            self.tokens_per_micro_batch,
        )
        check(self.max_skipped_steps >= 1, "training.max_skipped_steps", "at least 1", self.max_skipped_steps)
        check(self.stop_after >= 1, "training.stop_after", "at least 1", self.stop_after)
        check(self.save_every >= 0, "training.save_every", "at least 0", self.save_every)
        check(self.keep_last >= 1, "training.keep_last", "at least 1", self.keep_last)
