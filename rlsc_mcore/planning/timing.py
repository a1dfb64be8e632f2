"""Estimated seconds of a step's phases on given GPUs; rough, stated as such, good for choosing between layouts."""

from dataclasses import dataclass

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import num_parameters
from rlsc_mcore.planning.memory import WIDTH, Layout, kv_bytes_per_token


@dataclass(frozen=True)
class Gpu:
    """What one GPU and its links reach, as published."""

    name: str
    bf16_tflops: float
    memory_tb_per_s: float
    link_gb_per_s: float  # to the GPUs of its node, one direction
    network_gb_per_s: float = 50.0  # to other nodes, per GPU


GPUS = {
    "a100": Gpu("A100", 312, 2.0, 300),
    "h100": Gpu("H100", 989, 3.35, 450),
    "h200": Gpu("H200", 989, 4.8, 450),
    "b200": Gpu("B200", 2250, 8.0, 900),
}
TRAIN_EFFICIENCY = 0.45  # of the peak: the goal of benchmarks/bench_train_step.py
DECODE_EFFICIENCY = 0.6  # of the memory's bandwidth
ALL_REDUCE_S = 15e-6  # of a few rows of hidden states over the GPUs of a node: two per layer and decoded token


@dataclass(frozen=True)
class Work:
    """One step's rollouts, over all ranks."""

    num_rollouts: int
    prompt_tokens: int
    response_tokens: int  # mean
    longest_response: int
    max_num_seqs: int = 256


def seconds(shape: Architecture, layout: Layout, work: Work, gpu: Gpu, gpus_per_node: int) -> dict[str, float]:
    """Estimate the seconds of rollout, training, data-parallel communication and hot swap of one step."""
    cost = shape.cost_model()
    length = work.prompt_tokens + work.response_tokens
    passes = 4 / 3 if layout.recompute == "full" else 1.0
    flops = work.num_rollouts * cost.flops(length, work.response_tokens) * passes
    if layout.recompute == "selective":  # the MLP's forward once more: three products of 2 operations per weight and token
        flops += work.num_rollouts * length * shape.num_layers * 6 * shape.hidden_size * shape.ffn_hidden_size
    train = flops / (layout.tp * layout.dp * gpu.bf16_tflops * 1e12 * TRAIN_EFFICIENCY)
    numel, width = num_parameters(shape, layout.tp, padded=True), WIDTH[layout.dtype]
    per_engine = work.num_rollouts / layout.num_engines
    decoding = min(per_engine, work.max_num_seqs)
    engine_bytes = num_parameters(shape, layout.engine_ranks, padded=True) * width
    read = engine_bytes + decoding * kv_bytes_per_token(shape, layout) * (work.prompt_tokens + work.response_tokens / 2)
    token_s = read / (gpu.memory_tb_per_s * 1e12 * DECODE_EFFICIENCY)
    if layout.engine_ranks > 1:
        token_s += 2 * shape.num_layers * ALL_REDUCE_S
    # As many decoding steps as full batches take, but never fewer than the longest answer has tokens.
    rollout = token_s * max(per_engine * work.response_tokens / decoding, work.longest_response)
    reduce_link = gpu.link_gb_per_s if layout.tp * layout.dp <= gpus_per_node else gpu.network_gb_per_s
    share = (layout.dp - 1) / layout.dp
    reduce = numel * (4 + width) * share / (reduce_link * 1e9)
    tensor_parallel = 0.0
    if layout.tp > 1:
        # Forward and backward: a gather and a scatter of the hidden states around attention and MLP of every layer.
        moved = 8 * shape.num_layers * shape.hidden_size * width * (layout.tp - 1) / layout.tp
        tensor_parallel = moved * work.num_rollouts / layout.dp * length / (gpu.link_gb_per_s * 1e9) * passes
    return {
        "rollout": rollout,
        "training": train + tensor_parallel,
        "of it tensor-parallel": tensor_parallel,
        "reduce and gather": reduce,
        "swap": swapped_bytes(shape, layout) / (gpu.link_gb_per_s * 1e9),
    }


def swapped_bytes(shape: Architecture, layout: Layout) -> int:
    """Return what one GPU receives in a hot swap: what its engine's share has beyond its trainer's."""
    if layout.engine_ranks >= layout.tp:
        return 0
    engine = num_parameters(shape, layout.engine_ranks, padded=True) * WIDTH[layout.dtype]
    return engine * (layout.tp - layout.engine_ranks) // layout.tp


def communication_bytes(shape: Architecture, layout: Layout, work: Work) -> dict[str, int]:
    """Return the bytes that one GPU sends in a step: over its tensor-parallel and its data-parallel group, and receives in a swap."""
    numel, width = num_parameters(shape, layout.tp, padded=True), WIDTH[layout.dtype]
    tokens = work.num_rollouts / layout.dp * (work.prompt_tokens + work.response_tokens)
    tensor = 8 * shape.num_layers * shape.hidden_size * width * tokens * (layout.tp - 1) / layout.tp
    data = numel * (4 + width) * (layout.dp - 1) / layout.dp
    return {"tensor parallel": int(tensor), "data parallel": int(data), "hot swap": swapped_bytes(shape, layout)}
