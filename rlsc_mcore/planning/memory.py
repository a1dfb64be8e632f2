"""Compute the memory of one GPU by part and phase from shapes.

The counts cover the tensors that the trainer holds: parameters and gradients in Megatron's contiguous
buffers, optimizer states sharded over data-parallel ranks, and the tensors that autograd saves per token and
layer. On a CPU the sum for a step is within 10 % of the measured peak
(tests/distributed/test_plan_memory.py). On a GPU the counts have not been compared with measurements yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlsc_mcore.config import Config, LoraConfig
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import num_parameters, stage_parameters

GIB = 2**30

HEAD_WORKSPACE_BYTES = 5 << 28  # logits in memory at the same time; a test compares it with ops/chunks.py
CONTEXT_BYTES = int(1.5 * 2**30)  # CUDA and NCCL contexts of a process, which torch does not allocate
ENGINE_RESIDENT_BYTES = 1 << 30  # CUDA graphs and workspaces that a sleeping engine keeps
EXCHANGE_BUCKET_BYTES = 32 << 20  # same as in weight_sync/exchange.py
MASTER_BYTES = {"bfloat16": 12, "float32": 8}  # fp32 master (for bfloat16) and two fp32 moments
PRECISION_AWARE_BYTES = 8  # fp32 master and two bfloat16 moments
UPDATE_PART_ELEMENTS = (
    64 << 20
)  # parameters that TransformerEngine's FusedAdam updates at once, see training/optimizer.py
WIDTH = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """The parallel layout of a model and the sizes of a step."""

    tp: int
    dp: int
    recompute: str = "none"
    dtype: str = "bfloat16"
    distributed: bool = True
    tokens_per_micro_batch: int = 16384
    max_num_batched_tokens: int = 8192
    precision_aware: bool = False
    cpu_offload: float = 0.0  # fraction of the optimizer state that is on the host
    engine_tp: int | None = None  # tensor-parallel size of an engine; None: the trainer's
    offload_during_rollout: bool = False  # the optimizer state is on the host during the rollout
    grad_dtype: str = "float32"
    fused_swiglu: bool = True  # a GPU computes silu(gate) again in the backward pass
    pp: int = 1  # pipeline stages
    stage_layers: tuple[int, ...] | None = None  # layers per stage; None: balanced by compute time
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: all weights are trained
    keeps_start: bool = False  # a copy of the starting weights is on the device

    @property
    def engine_ranks(self) -> int:
        """Return the number of GPUs of one engine."""
        return self.engine_tp or self.tp

    @property
    def num_engines(self) -> int:
        """Return the number of engines, which sample at the same time."""
        return self.num_gpus // self.engine_ranks

    @property
    def num_gpus(self) -> int:
        """Return the total number of GPUs."""
        return self.tp * self.dp * self.pp

    def layers_of(self, shape: Architecture) -> tuple[int, ...]:
        """Return the number of layers of each pipeline stage."""
        return self.stage_layers or shape.stage_layers(self.pp)


def rank_parameters(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the number of parameters of one trainer rank in pipeline stage `stage`."""
    split, whole = stage_parameters(shape, shape.padded_vocab_size(layout.tp), layout.layers_of(shape), stage)
    return split // layout.tp + whole


def trained_parameters(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the number of trained parameters of one trainer rank in pipeline stage `stage`: all of them, or
    those of its adapters."""
    if not layout.lora.is_on:
        return rank_parameters(shape, layout, stage)
    return layout.layers_of(shape)[stage] * sum(
        # One factor is sharded like the projection, the other is whole.
        layout.lora.rank * (inner + outer // layout.tp if is_column_parallel else inner // layout.tp + outer)
        for outer, inner, is_column_parallel in _target_shapes(shape, layout)
    )


def adapter_base_parameters(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the number of weights of which one rank keeps the values before training, W0; 0 without
    adapters."""
    if not layout.lora.is_on:
        return 0
    numel = sum(outer * inner for outer, inner, _ in _target_shapes(shape, layout))
    return layout.layers_of(shape)[stage] * numel // layout.tp


def _target_shapes(shape: Architecture, layout: Layout) -> list[tuple[int, int, bool]]:
    """Return (output size, input size, is column-parallel) of each projection of a layer with an adapter."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes = {
        "q_proj": (queries, hidden, True),
        "k_proj": (keys, hidden, True),
        "v_proj": (keys, hidden, True),
        "o_proj": (hidden, queries, False),
        "gate_proj": (ffn, hidden, True),
        "up_proj": (ffn, hidden, True),
        "down_proj": (hidden, ffn, False),
    }
    return [shapes[name] for name in layout.lora.targets]


def state_bytes_per_parameter(layout: Layout) -> int:
    """Return the optimizer's bytes per trained parameter: master weight and moments."""
    return PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]


def saved_bytes_per_parameter(layout: Layout) -> int:
    """Return the bytes per trained parameter that a checkpoint holds: weight, master weight and moments.

    A distributed optimizer saves master weights in float32 training too, where they are the weights.
    """
    masters = 4 if layout.distributed and layout.dtype == "float32" and not layout.precision_aware else 0
    return WIDTH[layout.dtype] + state_bytes_per_parameter(layout) + masters


def checkpoint_bytes(shape: Architecture, layout: Layout) -> int:
    """Return the bytes of a checkpoint, which all tensor-parallel ranks and stages write once."""
    trained = sum(layout.tp * trained_parameters(shape, layout, stage) for stage in range(layout.pp))
    return saved_bytes_per_parameter(layout) * trained


def static_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state that one rank of a stage holds during
    training.

    With adapters the weights include theirs, and W0 if it is not on the host. They include a copy of the
    starting weights if the loss compares with them.
    """
    trained, frozen = trained_parameters(shape, layout, stage), 0
    if layout.lora.is_on:
        frozen = rank_parameters(shape, layout, stage)
        frozen += 0 if layout.lora.base_on_host else adapter_base_parameters(shape, layout, stage)
    shards = layout.dp if layout.distributed else 1
    states = state_bytes_per_parameter(layout)
    copies = rank_parameters(shape, layout, stage) if layout.keeps_start else 0
    return {
        "weights": WIDTH[layout.dtype] * (trained + frozen + copies),
        "gradients": WIDTH[layout.grad_dtype] * trained,
        "optimizer": int(states * trained // shards * (1 - layout.cpu_offload)),
    }


def activation_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the peak activation bytes of the micro-batches in flight in a stage, without the logits.

    In the 1F1B schedule, stage s of P has P - s micro-batches in flight; without a pipeline 1.

    Elements per token and layer: 7.5 hidden states (inputs and outputs of norms, residuals, dropout of rate
    0), four times the queries and three times the keys and values (projected, rotated, attended), and 3 MLP
    widths (gate, up, product), or 4 on a CPU, which keeps silu(gate) too. `selective` recomputes the MLP, so
    its activations are in memory for one layer at a time. Sequence parallelism shards all of these. The rotary
    factors are computed once per token.
    """
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    mlp = (3 if layout.fused_swiglu else 4) * shape.ffn_hidden_size / layout.tp
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
    """Return the bytes that the optimizer update allocates temporarily, after the activations are freed.

    These are float32 copies of bfloat16 inputs. TransformerEngine's FusedAdam (2.12 and earlier) updates the
    parameters in parts and copies both moments of a part; it frees the copies of a part only after it has
    made those of the next. Megatron's optimizer copies the gradients of this rank's shard, except with
    `precision_aware` or `cpu_offload`.
    """
    shard = trained_parameters(shape, layout, stage) // (layout.dp if layout.distributed else 1)
    if layout.precision_aware:
        largest = (
            max(shape.padded_vocab_size(layout.tp), 2 * shape.ffn_hidden_size)
            * shape.hidden_size
            // layout.tp
        )
        return 8 * min(shard, max(largest, UPDATE_PART_ELEMENTS) + UPDATE_PART_ELEMENTS)
    return 4 * shard if layout.grad_dtype == "bfloat16" and not layout.cpu_offload else 0


def train_bytes(shape: Architecture, layout: Layout) -> dict[str, int]:
    """Return the bytes by part on one GPU during training, for the pipeline stage that needs the most memory.

    The engine sleeps (level 2).
    """
    return max(
        (stage_train_bytes(shape, layout, stage) for stage in range(layout.pp)),
        key=lambda parts: sum(parts.values()),
    )


def stage_train_bytes(shape: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Return the bytes by part on one GPU of pipeline stage `stage` during training."""
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
    return shape.kv_bytes_per_token(WIDTH[layout.dtype], layout.engine_ranks)


def engine_weight_bytes(shape: Architecture, layout: Layout, stage: int = 0) -> int:
    """Return the bytes of the weights that the engine does not share with the trainer, and of the exchange
    buffers.

    If trainer and engine have the same tensor-parallel size, the engine's own weights are those of the other
    stages, and `linear_qkv` of its own stage because its row order differs. Otherwise all weights are its
    own.
    """
    width, ranks = WIDTH[layout.dtype], layout.engine_ranks
    numel = num_parameters(shape, ranks, padded=True)
    if ranks == layout.tp:
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        own = layout.layers_of(shape)[stage] * shape.hidden_size * rows // ranks
        numel = max(0, numel - rank_parameters(shape, layout, stage)) + own if layout.pp > 1 else own
    return numel * width + exchange_buffer_bytes(layout)


def exchange_buffer_bytes(layout: Layout) -> int:
    """Return the bytes of the weight exchange buffers: two buckets per sent stream and per sending rank."""
    if layout.tp * layout.pp == 1 or (layout.pp == 1 and layout.engine_ranks == layout.tp):
        return 0
    streams = max(1, layout.engine_ranks // layout.tp) + (layout.pp > 1 and layout.engine_ranks < layout.tp)
    sources = layout.pp * max(1, layout.tp // layout.engine_ranks)
    return 2 * (streams + sources) * EXCHANGE_BUCKET_BYTES


def rollout_bytes(shape: Architecture, layout: Layout, kv_cache: int) -> dict[str, int]:
    """Return the bytes by part on one GPU during the rollout, for the pipeline stage that needs the most
    memory."""
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
    """Return the bytes that the process of one GPU holds in host memory, by reason; the processes of a node
    add up.

    A save copies this rank's part of the weights and the optimizer state to the host. With a distributed
    optimizer the parts are equal (`training/optimizer_state.py`); otherwise one data-parallel rank copies
    everything. A load copies nothing.
    """
    numel = max(trained_parameters(shape, layout, stage) for stage in range(layout.pp))
    shard = numel // (layout.dp if layout.distributed else 1)
    states = state_bytes_per_parameter(layout)
    offloaded = states * shard if layout.offload_during_rollout else 0
    # Master weights, moments and a page-locked copy of the gradients.
    updated_there = int((states + 4) * shard * layout.cpu_offload)
    held = {"a save": saved_bytes_per_parameter(layout) * shard, "optimizer state": offloaded + updated_there}
    if layout.lora.is_on and layout.lora.base_on_host:
        base = max(adapter_base_parameters(shape, layout, stage) for stage in range(layout.pp))
        held["weights before training"] = WIDTH[layout.dtype] * base
    return held


def config_layout(config: Config, tp: int, dp: int) -> Layout:
    """Return the layout of a configuration on tp x dp x `parallel.pp` GPUs."""
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
        lora=config.lora,
        keeps_start=(config.teaches_with_start or config.compares_with_start) and not config.lora.is_on,
    )


def describe_bytes(parts: Mapping[str, int]) -> str:
    """Return the sum and the parts as text, in GiB per GPU."""
    told = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()) / GIB:.1f} GiB per GPU: {told}"
