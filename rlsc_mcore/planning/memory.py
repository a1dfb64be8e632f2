"""Bytes on one GPU by part and phase, from shapes alone.

The counts are those of the tensors that this trainer keeps: parameters and gradients in Megatron's contiguous
buffers, optimizer states sharded over data-parallel ranks, and what autograd saves per token and layer. On a
CPU the sum for a step is within 10 % of the measured peak (tests/distributed/test_plan_memory.py); on a GPU
it has not been compared yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlsc_mcore.config import Config
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import num_parameters, stage_parameters

GIB = 2**30

HEAD_WORKSPACE_BYTES = 1 << 30  # logits alive at once, as in ops/chunks.py on a GPU
CONTEXT_BYTES = int(1.5 * 2**30)  # CUDA and NCCL contexts of a process; not allocated by torch
ENGINE_RESIDENT_BYTES = 1 << 30  # CUDA graphs and workspaces that a sleeping engine keeps
EXCHANGE_BUCKET_BYTES = 32 << 20  # weight_sync/exchange.py
MASTER_BYTES = {"bfloat16": 12, "float32": 8}  # fp32 master (for bfloat16) and two fp32 moments
PRECISION_AWARE_BYTES = 8  # fp32 master and two bfloat16 moments
UPDATE_PART_ELEMENTS = (
    64 << 20
)  # parameters that TransformerEngine's FusedAdam updates at once, see training/optimizer.py
WIDTH = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """How a model is spread, and the sizes of a step."""

    tp: int
    dp: int
    recompute: str = "none"
    dtype: str = "bfloat16"
    distributed: bool = True
    tokens_per_micro_batch: int = 16384
    max_num_batched_tokens: int = 8192
    precision_aware: bool = False
    cpu_offload: float = 0.0  # share of the optimizer's states that is not on the GPU
    engine_tp: int | None = None  # of the engines; None: the trainer's
    offload_during_rollout: bool = False  # no optimizer state is on the GPU while sampling
    grad_dtype: str = "float32"
    fused_swiglu: bool = True  # as on a GPU
    pp: int = 1  # pipeline stages
    stage_layers: tuple[int, ...] | None = None  # None: as many per stage as make them equally slow

    @property
    def engine_ranks(self) -> int:
        """GPUs of one engine."""
        return self.engine_tp or self.tp

    @property
    def num_engines(self) -> int:
        """Engines that sample at the same time."""
        return self.num_gpus // self.engine_ranks

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.tp * self.dp * self.pp

    def layers_of(self, shape: Architecture) -> tuple[int, ...]:
        """Return the layers of each pipeline stage."""
        return self.stage_layers or shape.stage_layers(self.pp)


def rank_parameters(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the parameters of one of the trainer's ranks in pipeline stage `stage`."""
    split, whole = stage_parameters(shape, shape.padded_vocab_size(layout.tp), layout.layers_of(shape), stage)
    return split // layout.tp + whole


def static_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> dict[str, int]:
    """Return weights, gradients and optimizer states of one rank of a stage: what it holds all the time that
    it trains."""
    numel = rank_parameters(shape, layout, stage)
    shards = layout.dp if layout.distributed else 1
    states = PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]
    return {
        "weights": WIDTH[layout.dtype] * numel,
        "gradients": WIDTH[layout.grad_dtype] * numel,
        "optimizer": int(states * numel // shards * (1 - layout.cpu_offload)),
    }


def activation_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the peak of what the micro-batches in flight in a stage hold, without the head's logits.

    In the 1F1B schedule stage s of P holds P - s micro-batches: 1 without a pipeline.

    Per token and layer, in elements: 7.5 hidden states (norms in and out, residuals, dropout of rate 0),
    queries four times and keys and values three times (projected, rotated, attended), and 3 MLP widths (gate
    and up, product), 5 where SwiGLU is not fused. `selective` recomputes the MLP: its widths are alive in one
    layer at a time. Sequence parallelism splits all of it; each token's rotary factors are made once.
    """
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    mlp = (3 if layout.fused_swiglu else 5) * shape.ffn_hidden_size / layout.tp
    layer = (7.5 * hidden + 4 * queries + 3 * keys) / layout.tp + mlp
    ends = 5 * hidden / layout.tp + 2 * shape.head_dim
    num_layers, in_flight = layout.layers_of(shape)[stage], layout.pp - stage
    if layout.recompute == "full":
        kept = in_flight * num_layers * hidden / layout.tp + layer
    elif layout.recompute == "selective":
        kept = in_flight * num_layers * (layer - mlp) + mlp
    else:
        kept = in_flight * num_layers * layer
    ends *= in_flight
    return int(layout.tokens_per_micro_batch * WIDTH[layout.dtype] * (kept + ends))


def update_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return what an update allocates for its time, after the activations are freed: float32 copies of its
    bfloat16 inputs.

    TransformerEngine's FusedAdam (2.12 and earlier) copies both moments of the parameters that it updates at
    once, and frees the copies of one part after it made those of the next. Megatron's optimizer copies the
    gradients of this rank's shard, unless `precision_aware` or `cpu_offload` reads them as they are.
    """
    shard = rank_parameters(shape, layout, stage) // (layout.dp if layout.distributed else 1)
    if layout.precision_aware:
        largest = (
            max(shape.padded_vocab_size(layout.tp), 2 * shape.ffn_hidden_size)
            * shape.hidden_size
            // layout.tp
        )
        return 8 * min(shard, max(largest, UPDATE_PART_ELEMENTS) + UPDATE_PART_ELEMENTS)
    return 4 * shard if layout.grad_dtype == "bfloat16" and not layout.cpu_offload else 0


def train_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return what one GPU of the fullest pipeline stage holds while training, by part; the engine sleeps
    (level 2)."""
    return max(
        (_stage_train_bytes(shape, layout, stage) for stage in range(layout.pp)),
        key=lambda parts: sum(parts.values()),
    )


def _stage_train_bytes(shape: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    gathered = (
        layout.tokens_per_micro_batch * shape.hidden_size * WIDTH[layout.dtype] * 2 if layout.tp > 1 else 0
    )
    activations = activation_bytes(shape, layout, stage)
    head = HEAD_WORKSPACE_BYTES + gathered if stage == layout.pp - 1 else 0
    return {
        **static_bytes(shape, layout, stage),
        "activations": activations,
        "logits workspace": head,
        "update beyond them": max(0, update_bytes(shape, layout, stage) - activations - head),
        "engine": ENGINE_RESIDENT_BYTES,
        "contexts": CONTEXT_BYTES,
    }


def kv_bytes_per_token(shape: Architecture, layout: Layout) -> int:
    """Return the bytes of keys and values of one token on one rank."""
    return (
        2
        * shape.num_layers
        * (shape.num_kv_heads // layout.engine_ranks)
        * shape.head_dim
        * WIDTH[layout.dtype]
    )


def engine_weight_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the bytes of the engine's own weights on one GPU, and of the two buffers that received ones pass
    through.

    Where trainer and engine are of one tensor-parallel size, its own weights are the other stages' and of its
    own stage `linear_qkv`, whose rows lie otherwise; else all of them.
    """
    width, ranks = WIDTH[layout.dtype], layout.engine_ranks
    numel = num_parameters(shape, ranks, padded=True)
    if ranks == layout.tp:
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        own = layout.layers_of(shape)[stage] * shape.hidden_size * rows // ranks
        numel = max(0, numel - rank_parameters(shape, layout, stage)) + own if layout.pp > 1 else own
    return numel * width + exchange_buffer_bytes(layout)


def exchange_buffer_bytes(layout: Layout) -> int:
    """Return the bytes of the exchange's buffers: two of a bucket for each stream that is sent and each rank
    that sends."""
    if layout.tp * layout.pp == 1 or (layout.pp == 1 and layout.engine_ranks == layout.tp):
        return 0
    streams = max(1, layout.engine_ranks // layout.tp) + (layout.pp > 1 and layout.engine_ranks < layout.tp)
    sources = layout.pp * max(1, layout.tp // layout.engine_ranks)
    return 2 * (streams + sources) * EXCHANGE_BUCKET_BYTES


def rollout_bytes(shape: Architecture, layout: Layout, kv_cache: int) -> dict[str, int]:
    """Return what one GPU of the fullest pipeline stage holds while sampling, by part."""
    parts = (_stage_rollout_bytes(shape, layout, kv_cache, stage) for stage in range(layout.pp))
    return max(parts, key=lambda each: sum(each.values()))


def _stage_rollout_bytes(shape: Architecture, layout: Layout, kv_cache: int, stage: int) -> dict[str, int]:
    prefill = (
        layout.max_num_batched_tokens
        * WIDTH[layout.dtype]
        * (4 * shape.hidden_size + 3 * shape.ffn_hidden_size // layout.engine_ranks)
    )
    resident = static_bytes(shape, layout, stage)
    resident["gradients"] = 0  # `Trainer.release_memory` frees the buffers before the engine wakes
    if layout.offload_during_rollout:
        resident["optimizer"] = 0
    return {
        **resident,
        "KV cache": kv_cache,
        "engine": engine_weight_bytes(shape, layout, stage) + prefill + ENGINE_RESIDENT_BYTES,
        "contexts": CONTEXT_BYTES,
    }


def host_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return what one GPU's process holds in host memory, by reason; those of a node add up.

    A save copies this rank's part of weights and optimizer state, equal parts of both where the optimizer is
    distributed (`training/optimizer_state.py`), else all of them on one data-parallel rank; a load copies
    nothing.
    """
    numel = max(rank_parameters(shape, layout, stage) for stage in range(layout.pp))
    shard = numel // (layout.dp if layout.distributed else 1)
    states = PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]
    offloaded = states * shard if layout.offload_during_rollout else 0
    # Masters, moments and a page-locked copy of the gradients.
    updated_there = int((states + 4) * shard * layout.cpu_offload)
    return {"a save": (WIDTH[layout.dtype] + states) * shard, "optimizer state": offloaded + updated_there}


def config_layout(config: Config, tp: int, dp: int) -> Layout:
    """Return what a configuration's memory follows from, spread over tp x dp x `parallel.pp` GPUs."""
    return Layout(
        tp,
        dp,
        recompute=config.training.recompute,
        dtype=config.model.dtype,
        distributed=config.optimizer.distributed,
        tokens_per_micro_batch=config.training.tokens_per_micro_batch,
        max_num_batched_tokens=config.rollout.max_num_batched_tokens,
        precision_aware=config.optimizer.precision_aware,
        cpu_offload=config.optimizer.cpu_offload,
        engine_tp=config.rollout.tp or tp,
        offload_during_rollout=config.optimizer.offload_during_rollout,
        grad_dtype=config.optimizer.grad_dtype,
        pp=config.parallel.pp,
        stage_layers=config.parallel.stage_layers,
    )


def describe_bytes(parts: Mapping[str, int]) -> str:
    """Say the sum and the parts, in GiB per GPU."""
    told = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()) / GIB:.1f} GiB per GPU: {told}"
