"""Estimate the seconds of each phase of a step on given GPUs.

The estimates are rough; use them to compare layouts.
"""

from dataclasses import dataclass

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import num_parameters, stage_parameters
from rlsc_mcore.planning.memory import (
    MASTER_BYTES,
    PRECISION_AWARE_BYTES,
    WIDTH,
    Layout,
    adapter_base_parameters,
    kv_bytes_per_token,
    trained_parameters,
)


@dataclass(frozen=True)
class Gpu:
    """Published peak speeds of one GPU and its links."""

    name: str
    bf16_tflops: float
    memory_tb_per_s: float
    link_gb_per_s: float  # bandwidth to the GPUs of its node, one direction
    network_gb_per_s: float = 50.0  # bandwidth to other nodes, per GPU
    host_gb_per_s: float = 25.0  # bandwidth to page-locked host memory, one direction
    host_memory_gb_per_s: float = 37.0  # bandwidth of the host memory, per GPU of a node with eight


GPUS = {
    "a100": Gpu("A100", 312, 2.0, 300),
    "h100": Gpu("H100", 989, 3.35, 450),
    "h200": Gpu("H200", 989, 4.8, 450),
    "b200": Gpu("B200", 2250, 8.0, 900),
}
TRAIN_EFFICIENCY = 0.45  # fraction of the peak FLOP/s: the target of benchmarks/bench_train_step.py
LORA_PRODUCTS = 2 / 3  # forward and gradient of the input, of three products per weight
DECODE_EFFICIENCY = 0.6  # fraction of the memory bandwidth
ALL_REDUCE_S = (
    15e-6  # seconds of an all-reduce of a few hidden states in a node; two per layer and decoded token
)


@dataclass(frozen=True)
class Work:
    """The rollouts of one step, over all ranks."""

    num_rollouts: int
    prompt_tokens: int
    response_tokens: int  # mean
    longest_response: int
    max_num_seqs: int = 256


def seconds(
    shape: Architecture, layout: Layout, work: Work, gpu: Gpu, gpus_per_node: int
) -> dict[str, float]:
    """Estimate the seconds of one step by phase: rollout, training, data-parallel communication, hot swap,
    offload."""
    cost = shape.cost_model()
    length = work.prompt_tokens + work.response_tokens
    passes = 4 / 3 if layout.recompute == "full" else 1.0
    flops = work.num_rollouts * cost.flops(length, work.response_tokens) * passes
    if (
        layout.recompute == "selective"
    ):  # a second MLP forward: three matrix products with 2 FLOPs per weight and token
        flops += work.num_rollouts * length * shape.num_layers * 6 * shape.hidden_size * shape.ffn_hidden_size
    if layout.lora.is_on:  # no products for the gradients of the frozen weights
        flops *= LORA_PRODUCTS
    train = flops / (layout.num_gpus * gpu.bf16_tflops * 1e12 * TRAIN_EFFICIENCY)
    waits = pipeline_waits(shape, layout, work)
    width = WIDTH[layout.dtype]
    per_engine = work.num_rollouts / layout.num_engines
    decoding = min(per_engine, work.max_num_seqs)
    engine_bytes = num_parameters(shape, layout.engine_ranks, padded=True) * width
    read = engine_bytes + decoding * kv_bytes_per_token(shape, layout) * (
        work.prompt_tokens + work.response_tokens / 2
    )
    token_s = read / (gpu.memory_tb_per_s * 1e12 * DECODE_EFFICIENCY)
    if layout.engine_ranks > 1:
        token_s += 2 * shape.num_layers * ALL_REDUCE_S
    # Number of decoding steps with full batches, but at least the length of the longest answer.
    rollout = token_s * max(per_engine * work.response_tokens / decoding, work.longest_response)
    reduce_link = gpu.link_gb_per_s if layout.num_gpus <= gpus_per_node else gpu.network_gb_per_s
    share = (layout.dp - 1) / layout.dp
    trained = max(trained_parameters(shape, layout, stage) for stage in range(layout.pp))
    reduce = trained * (4 + width) * share / (reduce_link * 1e9)
    tensor_parallel = 0.0
    if layout.tp > 1:
        # Forward and backward: an all-gather and a reduce-scatter of the hidden states around attention and
        # MLP in every layer.
        moved = 8 * max(layout.layers_of(shape)) * shape.hidden_size * width * (layout.tp - 1) / layout.tp
        tensor_parallel = moved * work.num_rollouts / layout.dp * length / (gpu.link_gb_per_s * 1e9) * passes
    # The ranks of different stages are far apart, so with several nodes they are on different nodes.
    swap_link = (
        gpu.network_gb_per_s if layout.pp > 1 and layout.num_gpus > gpus_per_node else gpu.link_gb_per_s
    )
    return {
        "rollout": rollout,
        "training": (train + tensor_parallel) * waits,
        "of it tensor-parallel": tensor_parallel,
        "of it pipeline waits": (train + tensor_parallel) * (waits - 1),
        "reduce and gather": reduce,
        "swap": swapped_bytes(shape, layout) / (swap_link * 1e9),
        "offload": offload_seconds(shape, layout, gpu) + merge_seconds(shape, layout, gpu),
    }


def merge_seconds(shape: Architecture, layout: Layout, gpu: Gpu) -> float:
    """Estimate the seconds in which an update of adapters writes the merged weights, 0 without adapters.

    W0 is read from the host or from the GPU.
    """
    base = max(adapter_base_parameters(shape, layout, stage) for stage in range(layout.pp))
    read = gpu.host_gb_per_s * 1e9 if layout.lora.base_on_host else gpu.memory_tb_per_s * 1e12
    return base * WIDTH[layout.dtype] / read


def pipeline_waits(shape: Architecture, layout: Layout, work: Work) -> float:
    """Return the factor by which the pipeline bubble and unbalanced stages lengthen training; 1 without a
    pipeline."""
    if layout.pp == 1:
        return 1.0
    tokens = work.num_rollouts / layout.dp * (work.prompt_tokens + work.response_tokens)
    micro_batches = max(1.0, tokens / layout.tokens_per_micro_batch)
    cost = shape.cost_model()
    stages = [layers * cost.per_token / shape.num_layers for layers in layout.layers_of(shape)]
    stages[-1] += cost.per_trained_token * work.response_tokens / (work.prompt_tokens + work.response_tokens)
    return (micro_batches + layout.pp - 1) / micro_batches * max(stages) * layout.pp / sum(stages)


def offload_seconds(shape: Architecture, layout: Layout, gpu: Gpu) -> float:
    """Estimate the seconds per step that optimizer state in host memory costs.

    With `offload_during_rollout` the state is copied twice. With `cpu_offload` the update runs on the host:
    it copies gradients to the host and weights to the GPU, and reads and writes master weights, moments and
    gradients in host memory.
    """
    shard = max(trained_parameters(shape, layout, stage) for stage in range(layout.pp)) / (
        layout.dp if layout.distributed else 1
    )
    states = PRECISION_AWARE_BYTES if layout.precision_aware else MASTER_BYTES[layout.dtype]
    if layout.offload_during_rollout:
        return 2 * states * shard / (gpu.host_gb_per_s * 1e9)
    moved, touched = 4 + WIDTH[layout.dtype], 2 * states + 4
    return layout.cpu_offload * shard * (moved / gpu.host_gb_per_s + touched / gpu.host_memory_gb_per_s) / 1e9


def swapped_bytes(shape: Architecture, layout: Layout) -> int:
    """Return the largest number of bytes that one GPU receives in a hot swap.

    Rank r of E engine ranks needs shard r of E of every sharded weight (`weight_sync/plan.py`). Of its own
    pipeline stage it already holds one of T trainer shards and receives only the rest of its engine shard. Of
    the other stages it receives its whole shard and the norms.
    """
    engine, per_stage = layout.engine_ranks, layout.tp * layout.dp
    stages = [
        stage_parameters(shape, shape.padded_vocab_size(layout.tp), layout.layers_of(shape), s)
        for s in range(layout.pp)
    ]
    tied_copy = (
        shape.padded_vocab_size(layout.tp) * shape.hidden_size
        if shape.tied_embeddings and layout.pp > 1
        else 0
    )
    most = 0.0
    for stage, (split, _) in enumerate(stages):
        others_split = sum(other for number, (other, _) in enumerate(stages) if number != stage)
        others_whole = sum(whole for number, (_, whole) in enumerate(stages) if number != stage)
        # Tied embeddings are on the first and the last stage but are one weight of the engine.
        others_split -= tied_copy
        for rank in range(stage * per_stage, stage * per_stage + min(per_stage, max(layout.tp, engine))):
            part, held = rank % engine / engine, rank % layout.tp / layout.tp
            overlap = max(0.0, min(part + 1 / engine, held + 1 / layout.tp) - max(part, held))
            most = max(most, split * (1 / engine - overlap) + others_split / engine + others_whole)
    return round(most * WIDTH[layout.dtype])


def communication_bytes(shape: Architecture, layout: Layout, work: Work) -> dict[str, int]:
    """Return the bytes that one GPU sends per step in its tensor-, data- and pipeline-parallel group, and the
    bytes that it receives in a hot swap."""
    numel, width = (
        max(trained_parameters(shape, layout, stage) for stage in range(layout.pp)),
        WIDTH[layout.dtype],
    )
    tokens = work.num_rollouts / layout.dp * (work.prompt_tokens + work.response_tokens)
    tensor = (
        8 * max(layout.layers_of(shape)) * shape.hidden_size * width * tokens * (layout.tp - 1) / layout.tp
    )
    data = numel * (4 + width) * (layout.dp - 1) / layout.dp
    sent = {"tensor parallel": int(tensor), "data parallel": int(data)}
    if layout.pp > 1:  # hidden states in the forward pass, their gradients in the backward pass
        sent["pipeline"] = int(2 * tokens * shape.hidden_size * width / layout.tp)
    return {**sent, "hot swap": swapped_bytes(shape, layout)}
