"""Bytes on one GPU by part and phase, from shapes alone.

The counts are those of the tensors that this trainer keeps: parameters and gradients in Megatron's contiguous buffers,
optimizer states sharded over data-parallel ranks, and what autograd saves per token and layer. On a CPU the sum for a step
is within 10 % of the measured peak (tests/distributed/test_plan_memory.py); on a GPU it has not been compared yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlsc_mcore.config import Config
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import num_parameters

GIB = 2**30

HEAD_WORKSPACE_BYTES = 1 << 30  # logits alive at once, as in ops/chunks.py on a GPU
CONTEXT_BYTES = int(1.5 * 2**30)  # CUDA and NCCL contexts of a process; not allocated by torch
ENGINE_RESIDENT_BYTES = 1 << 30  # CUDA graphs and workspaces that a sleeping engine keeps
EXCHANGE_BUCKET_BYTES = 32 << 20  # weight_sync/exchange.py
MASTER_BYTES = {"bfloat16": 12, "float32": 8}  # fp32 master (for bfloat16) and two fp32 moments
PRECISION_AWARE_BYTES = 8  # fp32 master and two bfloat16 moments
UPDATE_PART_ELEMENTS = 64 << 20  # parameters that TransformerEngine's FusedAdam updates at once, see training/optimizer.py
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

    @property
    def engine_ranks(self) -> int:
        """GPUs of one engine."""
        return self.engine_tp or self.tp

    @property
    def num_engines(self) -> int:
        """Engines that sample at the same time."""
        return self.tp * self.dp // self.engine_ranks


def static_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return weights, gradients and optimizer states of one rank: what it holds all the time that it trains."""
    numel = num_parameters(shape, layout.tp, padded=True)
    shards = layout.dp if layout.distributed else 1
    states = PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]
    return {
        "weights": WIDTH[layout.dtype] * numel,
        "gradients": WIDTH[layout.grad_dtype] * numel,
        "optimizer": int(states * numel // shards * (1 - layout.cpu_offload)),
    }


def activation_bytes(shape: Architecture, layout: Layout) -> int:
    """Return the peak of what one micro-batch's forward and backward hold, without the head's logits.

    Per token and layer, in elements: 7.5 hidden states (norms in and out, residuals, dropout of rate 0), queries four times and
    keys and values three times (projected, rotated, attended), and 3 MLP widths (gate and up, product), 5 where SwiGLU is not fused.
    `selective` recomputes the MLP: its widths are alive in one layer at a time. Sequence parallelism splits all of it; each token's
    rotary factors are made once.
    """
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    mlp = (3 if layout.fused_swiglu else 5) * shape.ffn_hidden_size / layout.tp
    layer = (7.5 * hidden + 4 * queries + 3 * keys) / layout.tp + mlp
    ends = 5 * hidden / layout.tp + 2 * shape.head_dim
    if layout.recompute == "full":
        kept = shape.num_layers * hidden / layout.tp + layer
    elif layout.recompute == "selective":
        kept = shape.num_layers * (layer - mlp) + mlp
    else:
        kept = shape.num_layers * layer
    return int(layout.tokens_per_micro_batch * WIDTH[layout.dtype] * (kept + ends))


def update_bytes(shape: Architecture, layout: Layout) -> int:
    """Return what an update allocates for its time, after the activations are freed: float32 copies of its bfloat16 inputs.

    TransformerEngine's FusedAdam (2.12 and earlier) copies both moments of the parameters that it updates at once, and frees the
    copies of one part after it made those of the next. Megatron's optimizer copies the gradients of this rank's shard, unless
    `precision_aware` or `cpu_offload` reads them as they are.
    """
    shard = num_parameters(shape, layout.tp, padded=True) // (layout.dp if layout.distributed else 1)
    if layout.precision_aware:
        largest = max(shape.padded_vocab_size(layout.tp), 2 * shape.ffn_hidden_size) * shape.hidden_size // layout.tp
        return 8 * min(shard, max(largest, UPDATE_PART_ELEMENTS) + UPDATE_PART_ELEMENTS)
    return 4 * shard if layout.grad_dtype == "bfloat16" and not layout.cpu_offload else 0


def train_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return what one GPU holds while training, by part; the engine sleeps (level 2)."""
    gathered = layout.tokens_per_micro_batch * shape.hidden_size * WIDTH[layout.dtype] * 2 if layout.tp > 1 else 0
    activations, head = activation_bytes(shape, layout), HEAD_WORKSPACE_BYTES + gathered
    return {
        **static_bytes(shape, layout),
        "activations": activations,
        "logits workspace": head,
        "update beyond them": max(0, update_bytes(shape, layout) - activations - head),
        "engine": ENGINE_RESIDENT_BYTES,
        "contexts": CONTEXT_BYTES,
    }


def kv_bytes_per_token(shape: Architecture, layout: Layout) -> int:
    """Return the bytes of keys and values of one token on one rank."""
    return 2 * shape.num_layers * (shape.num_kv_heads // layout.engine_ranks) * shape.head_dim * WIDTH[layout.dtype]


def engine_weight_bytes(shape: Architecture, layout: Layout) -> int:
    """Return the bytes of the engine's own weights on one GPU.

    Only `linear_qkv` where trainer and engine are of one size, as its rows lie otherwise; else all of them, and the two buffers
    that they are gathered through.
    """
    width, ranks = WIDTH[layout.dtype], layout.engine_ranks
    if ranks == layout.tp:
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return shape.num_layers * shape.hidden_size * rows // ranks * width
    buffers = 2 * (1 + layout.tp) * EXCHANGE_BUCKET_BYTES if layout.tp > 1 else 0
    return num_parameters(shape, ranks, padded=True) * width + buffers


def rollout_bytes(shape: Architecture, layout: Layout, kv_cache: int) -> dict[str, int]:
    """Return what one GPU holds while sampling, by part."""
    prefill = (
        layout.max_num_batched_tokens * WIDTH[layout.dtype] * (4 * shape.hidden_size + 3 * shape.ffn_hidden_size // layout.engine_ranks)
    )
    resident = static_bytes(shape, layout)
    resident["gradients"] = 0  # `Trainer.release_memory` frees the buffers before the engine wakes
    if layout.offload_during_rollout:
        resident["optimizer"] = 0
    return {
        **resident,
        "KV cache": kv_cache,
        "engine": engine_weight_bytes(shape, layout) + prefill + ENGINE_RESIDENT_BYTES,
        "contexts": CONTEXT_BYTES,
    }


def host_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return what one GPU's process holds in host memory, by reason; those of a node add up.

    A save copies this rank's part of weights and optimizer state, equal parts of both where the optimizer is distributed
    (`training/optimizer_state.py`), else all of them on one data-parallel rank; a load copies nothing.
    """
    numel = num_parameters(shape, layout.tp, padded=True)
    shard = numel // (layout.dp if layout.distributed else 1)
    states = PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]
    offloaded = states * shard if layout.offload_during_rollout else 0
    # Masters, moments and a page-locked copy of the gradients.
    updated_there = int((states + 4) * shard * layout.cpu_offload)
    return {"a save": (WIDTH[layout.dtype] + states) * shard, "optimizer state": offloaded + updated_there}


def config_layout(config: Config, tp: int, dp: int) -> Layout:
    """Return what a configuration's memory follows from, spread over tp x dp GPUs."""
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
    )


def describe_bytes(parts: Mapping[str, int]) -> str:
    """Say the sum and the parts, in GiB per GPU."""
    told = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()) / GIB:.1f} GiB per GPU: {told}"
