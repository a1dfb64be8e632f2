"""Simulate a step on 8 to 1,024 GPUs from recorded answer lengths: `python -m benchmarks.bench_scale`. Needs
no GPU.

Nothing in its result was measured on a cluster. The simulation draws answer lengths, assigns them to engines
and data-parallel ranks with the code of the training loop, and takes seconds from the planner's model of a
GPU. Its assumptions:

- lengths: those of the AIME 2024 reference solutions (`benchmarks/lengths`); each sample is a log-normal
  factor (sigma 0.35) away, times a scale, cut at the limit; prompts have 150 tokens;
- an engine decodes at most 256 sequences at once; a token takes the time of reading the weights and the KV
  cache at 60 % of the memory bandwidth, plus two all-reduces of 15 us per layer; when a sequence ends, the
  next one starts;
- training runs at 45 % of the GPU's peak, on the layout that `rlsc plan` finds best, until its slowest
  data-parallel rank is done;
- a header of 72 bytes per answer reaches every rank over gloo at 1 GB/s per node; tokens are transferred at
  50 GB/s per GPU;
- merging headers and assigning sequences takes the time that it takes in this process.

The last columns show the bytes that each rank would receive if all answers were sent to all ranks as pickles:
17.5 bytes per token, twice, and 137 ns each to unpickle, as measured with tuples of Python numbers.
"""

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks.harness import command_line, save
from rlsc_mcore.data.balance import assign, loads
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import MODELS, num_parameters
from rlsc_mcore.planning.layouts import Candidate, candidates
from rlsc_mcore.planning.memory import WIDTH, Layout, kv_bytes_per_token
from rlsc_mcore.planning.timing import (
    ALL_REDUCE_S,
    DECODE_EFFICIENCY,
    GPUS,
    TRAIN_EFFICIENCY,
    Gpu,
    Work,
    pipeline_waits,
)
from rlsc_mcore.rollout.sampling import spread_samples

LENGTHS = Path(__file__).parent / "lengths" / "aime24_solutions.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "scale.svg"
NUM_SAMPLES, PROMPT_TOKENS, MAX_SEQS, SIGMA = 16, 150, 256, 0.35
HEADER_BYTES, TOKEN_BYTES, PICKLED_BYTES = 72, 8, 17.5
HOST_BYTES_PER_S, NETWORK_BYTES_PER_S = 1e9, 50e9
# (model, GPUs, questions per step, length scale, longest answer)
CASES = [
    *(("qwen2.5-7b", gpus, max(64, gpus), 1.0, 3072) for gpus in (8, 64, 512, 1024)),
    ("qwen2.5-7b", 512, 64, 1.0, 3072),
    *(("qwen2.5-7b", gpus, gpus, 8.0, 32768) for gpus in (64, 512)),
    *(("qwen2.5-72b", gpus, max(64, gpus), 1.0, 3072) for gpus in (32, 128, 512, 1024)),
]


def main() -> None:
    """Simulate every case and write results/cpu/scale.json and the figure."""
    options = command_line(__doc__)
    rows = [simulate(*case) for case in CASES]
    for row in rows:
        print(json.dumps(row))
    save(__file__, {"rows": rows}, torch.device("cpu"), options.out)
    draw(rows, FIGURE)


def simulate(model: str, num_gpus: int, num_questions: int, scale: float, longest: int) -> dict[str, Any]:
    """Simulate one step; returns its layout, seconds by phase, and bytes per rank."""
    shape, gpu = MODELS[model], GPUS["h100"]
    lengths = draw_lengths(np.random.default_rng(0), num_questions, scale, longest)
    work = Work(lengths.size, PROMPT_TOKENS, int(lengths.mean()), longest, MAX_SEQS)
    tokens = max(16384, PROMPT_TOKENS + longest)
    found = candidates(
        shape,
        Layout(1, 1, tokens_per_micro_batch=tokens),
        work,
        gpu,
        num_gpus=num_gpus,
        gpu_bytes=80 << 30,
        gpus_per_node=8,
    )
    best = found[0]
    assert not best.why_not, f"{model} on {num_gpus} GPUs: {best.why_not}"
    layout = best.layout
    engines = [
        engine_seconds(
            shape,
            layout,
            gpu,
            [int(lengths[question, sample]) for question, samples in share for sample in samples],
        )
        for share in (
            spread_samples(num_questions, NUM_SAMPLES, layout.num_engines, engine)
            for engine in range(layout.num_engines)
        )
    ]
    training, exchange = train_seconds(shape, best, work, gpu, lengths)
    total_tokens = int(lengths.sum())
    pickled = 2 * PICKLED_BYTES * (total_tokens + lengths.size * PROMPT_TOKENS)
    seconds = {
        "rollout": sum(engines) / len(engines),
        "rollout tail": max(engines) - sum(engines) / len(engines),
        "exchange": exchange["seconds"],
        "training": training,
        "reduce, swap, offload": sum(best.seconds[name] for name in ("reduce and gather", "swap", "offload")),
    }
    return {
        "model": model,
        "gpus": num_gpus,
        "answers": int(lengths.size),
        "mean_length": round(float(lengths.mean()), 1),
        "longest": longest,
        "layout": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "engine_tp": layout.engine_ranks,
            "recompute": layout.recompute,
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "step_seconds": round(sum(seconds.values()), 2),
        "tokens_per_s_per_gpu": round(total_tokens / sum(seconds.values()) / num_gpus, 1),
        "train_imbalance": round(exchange["imbalance"], 4),
        "moved_share": round(exchange["moved_share"], 4),
        "received_header_bytes": int(HEADER_BYTES * lengths.size),
        "received_token_bytes": int(exchange["token_bytes"]),
        "received_bytes_if_all_went_to_all": int(pickled),
        "unpickling_seconds_if_all_went_to_all": round(2 * 137e-9 * total_tokens, 2),
    }


def draw_lengths(rng: np.random.Generator, num_questions: int, scale: float, longest: int) -> np.ndarray:
    """Draw a step's answer lengths: int64 [questions, samples]."""
    recorded = [answers[0] for _, answers in json.loads(LENGTHS.read_text(encoding="utf-8"))["questions"]]
    centres = rng.choice(recorded, num_questions)[:, None] * scale
    return np.clip(centres * np.exp(rng.normal(0.0, SIGMA, (num_questions, NUM_SAMPLES))), 8, longest).astype(
        np.int64
    )


def engine_seconds(shape: Architecture, layout: Layout, gpu: Gpu, lengths: Sequence[int]) -> float:
    """Return the seconds of decoding `lengths` on one engine, at most `MAX_SEQS` at once. When a sequence
    ends, the next one starts."""
    width = WIDTH[layout.dtype]
    weights = num_parameters(shape, layout.engine_ranks, padded=True) * width
    per_token = kv_bytes_per_token(shape, layout)
    bandwidth = gpu.memory_tb_per_s * 1e12 * DECODE_EFFICIENCY
    latency = 2 * shape.num_layers * ALL_REDUCE_S if layout.engine_ranks > 1 else 0.0
    waiting = list(lengths)[::-1]
    ends: list[int] = []  # a heap of the steps at which running sequences end
    starts = 0  # sum of the steps at which running sequences began
    begun: dict[int, list[int]] = {}
    seconds, step = 0.0, 0
    while waiting or ends:
        while waiting and len(ends) < MAX_SEQS:
            end = step + waiting.pop()
            heapq.heappush(ends, end)
            begun.setdefault(end, []).append(step)
            starts += step
        count = ends[0] - step
        held = (
            len(ends) * (PROMPT_TOKENS + step + count / 2) - starts
        )  # mean tokens in the cache until the next end
        seconds += count * ((weights + held * per_token) / bandwidth + latency)
        step = ends[0]
        while ends and ends[0] == step:
            heapq.heappop(ends)
            starts -= begun[step].pop()
    return seconds


def train_seconds(
    shape: Architecture, best: Candidate, work: Work, gpu: Gpu, lengths: np.ndarray
) -> tuple[float, dict[str, float]]:
    """Assign the sequences with the code of the training loop. Return the seconds of the slowest
    data-parallel rank and the bytes of the exchange."""
    layout, cost = best.layout, shape.cost_model()
    flat = [int(length) for length in lengths.ravel()]
    engine_of = np.zeros(lengths.shape, dtype=np.int64)
    for engine in range(layout.num_engines):
        for question, samples in spread_samples(lengths.shape[0], NUM_SAMPLES, layout.num_engines, engine):
            engine_of[question, samples.start : samples.stop] = engine
    per_stage = layout.tp * layout.dp
    owners = [int(engine) * layout.engine_ranks % per_stage // layout.tp for engine in engine_of.ravel()]
    before = process_time()
    costs = [cost.flops(PROMPT_TOKENS + length, length) for length in flat]
    targets = assign(costs, owners, layout.dp)
    planning = process_time() - before
    totals = loads(costs, targets, layout.dp)
    passes = {"full": 4 / 3, "selective": 1.22}.get(layout.recompute, 1.0)
    compute = max(totals) * passes / (layout.tp * layout.pp * gpu.bf16_tflops * 1e12 * TRAIN_EFFICIENCY)
    # Per stage and group: a rank receives sequences that its group trains and its engine did not sample.
    arriving = np.zeros((layout.pp, layout.dp))
    sampled_by = engine_of.ravel().tolist()
    for length, engine, target in zip(flat, sampled_by, targets, strict=True):
        for stage in range(layout.pp):
            if (stage * per_stage + target * layout.tp) // layout.engine_ranks != engine:
                arriving[stage, target] += TOKEN_BYTES * length
    headers = HEADER_BYTES * len(flat) * 8  # sent to the eight ranks of a node
    return (compute + best.seconds["of it tensor-parallel"]) * pipeline_waits(shape, layout, work), {
        "seconds": planning + headers / HOST_BYTES_PER_S + arriving.max() / NETWORK_BYTES_PER_S,
        "imbalance": max(totals) * layout.dp / sum(totals) - 1,
        "moved_share": sum(a != b for a, b in zip(owners, targets, strict=True)) / len(targets),
        "token_bytes": float(arriving.max()),
    }


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the seconds of each case as stacked bars; draw nothing if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlsc"  # makes the file reproducible
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.2))
    labels = [
        f"{row['model']}, {row['gpus']} GPUs, {row['answers']} answers, at most {row['longest']}"
        for row in rows
    ]
    left = [0.0] * len(rows)
    for name in rows[0]["seconds"]:
        shares = [row["seconds"][name] / row["step_seconds"] for row in rows]
        axes.barh(labels, shares, left=left, label=name)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for index, row in enumerate(rows):
        axes.text(1.01, index, f"{row['step_seconds']:.0f} s", va="center", fontsize="small")
    axes.set(xlim=(0, 1.1), xlabel="share of a step's seconds (simulated)")
    axes.invert_yaxis()
    axes.legend(fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.3, -0.12))
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
