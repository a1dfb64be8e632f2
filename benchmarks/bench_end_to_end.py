"""Measure the phases of a step and the cost of colocation: `python -m benchmarks.bench_end_to_end [--config
FILE ...]`.

Measures three things in one run on one machine:

1. seconds and share of each phase of a step (rollout, pack, train, swap), tokens/s, memory and, on a GPU,
  energy;
2. rollout tokens/s, compared with a stock `vllm.LLM` on the exported weights with the same requests (in its
  own process, in turn);
3. forward+backward tokens/s, compared with plain `transformers` on the same sequences (length-sorted padded
  batches, full logits).

`--only phases` omits the two comparisons, for models that fit a GPU only once. Correctness is checked first:
the log-probs of trainer and engine must agree, and `transformers` must give the trainer's loss. Absolute
speeds depend on the machine and on other processes that use it; quote only ratios and shares.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks.plain_transformers import Weigh, accumulate, pad_by_length  # noqa: E402
from rlsc_mcore.algorithm.objective import WeightedObjective  # noqa: E402
from rlsc_mcore.config_file import parse_config, read_flags  # noqa: E402
from rlsc_mcore.data.packing import merge_identical, pack  # noqa: E402
from rlsc_mcore.observability.mismatch import LIMITS  # noqa: E402
from rlsc_mcore.rollout.engine import PINNED_COMPILATION, SamplingRequest  # noqa: E402
from rlsc_mcore.rollout.sampling import sample_seed  # noqa: E402
from rlsc_mcore.training.announce import versions  # noqa: E402
from rlsc_mcore.training.session import Session  # noqa: E402
from rlsc_mcore.training.signals import StopRequest  # noqa: E402

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/tiny_cpu.yaml"))
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of the loop that are timed, after one that is not"
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions of each comparison")
    parser.add_argument(
        "--only", choices=["phases"], help="leave out the comparisons with other engines and trainers"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/end_to_end.json"))
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = ["--evaluation.path", "None", "--observability.tensorboard", "False"]
        config = parse_config(
            [*read_flags(options.config), *evaluation, *flags, "--run-dir", f"{scratch}/run"]
        )
        session = Session(config, StopRequest())
        result = {
            "about": about(session, options),
            "correct": {},
            "phases": time_phases(session, options.steps),
        }
        save(result, options.output)
        export = Path(scratch) / "export"
        result["correct"]["engine_parameters_equal_export"] = session.export(export)
        if options.only is None:
            for part, compare in (("rollout", compare_rollout), ("train", compare_training)):
                result[part] = compare(session, export, options.repeats, result["correct"])
                save(result, options.output)
        save(result, options.output)
        print(json.dumps(result, indent=1))
        sys.stdout.flush()
        session.close()
    os._exit(0)  # skip the shutdown of engine threads and process groups


def save(result: dict[str, Any], file: Path) -> None:
    """Write the results so far, so that an interrupted run keeps them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def time_phases(session: Session, steps: int) -> dict[str, Any]:
    """Run the loop's stages and return median seconds and share of each phase; the first step warms up."""
    rows = []
    for step in range(steps + 1):
        begin = time.perf_counter()
        rollouts = session.sample(step)
        outcome = session.train(step, rollouts)
        session.hot_swap()
        session.record(step, rollouts, outcome)
        rows.append({**session.timer.seconds, "whole_step": time.perf_counter() - begin})
    recorded = session.metrics.rows[1:]
    gap, limit = (
        max(row["log_prob_gap_mean"] for row in recorded),
        harness.MEAN_GAP_LIMIT[session.config.model.dtype],
    )
    assert gap < limit, f"trainer and engine disagree by {gap} per token, more than {limit}"
    timed = rows[1:]
    seconds = {name: statistics.median(row[name] for row in timed) for name in timed[0]}
    seconds["other"] = statistics.median(
        row["whole_step"] - sum(v for k, v in row.items() if k != "whole_step") for row in timed
    )
    return {
        "median_seconds": {name: round(value, 5) for name, value in seconds.items()},
        "share": {
            name: round(value / seconds["whole_step"], 4)
            for name, value in seconds.items()
            if name != "whole_step"
        },
        "steps": steps,
        "sampled_tokens": round(
            statistics.median(row["mean_length"] for row in recorded) * samples_per_step(session)
        ),
        "rollout_tokens_per_s": statistics.median(row["rollout_tokens_per_s"] for row in recorded),
        "train_tokens_per_s": statistics.median(row["train_tokens_per_s"] for row in recorded),
        "log_prob_gap_mean": gap,
        "peak_host_memory_gib": round(peak_host_bytes() / 2**30, 3),
        **device_facts(session, recorded),
    }


def samples_per_step(session: Session) -> int:
    """Return the number of answers of one step."""
    return session.config.data.questions_per_step * session.config.rollout.num_samples


def device_facts(session: Session, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the allocator's peak, and joules per step and per sampled token if NVML measures energy; nothing
    on a CPU."""
    if not session.backend.is_cuda:
        return {}
    facts: dict[str, Any] = {"peak_device_bytes": session.backend.memory_bytes()["device_peak"]}
    metered = [row["gpu"] for row in rows if "gpu" in row]
    if metered:
        facts["energy_j_per_step"] = statistics.median(gpu["energy_j"] for gpu in metered)
        facts["energy_j_per_token"] = statistics.median(gpu["energy_j_per_token"] for gpu in metered)
    return facts


def compare_rollout(session: Session, export: Path, repeats: int, correct: dict[str, Any]) -> dict[str, Any]:
    """Time the colocated engine and a stock one in turn on the same requests."""
    config = session.config
    indices = session.inputs.sampler.step_indices(0)
    requests = [
        SamplingRequest(
            session.inputs.prompts[i],
            config.rollout.num_samples,
            config.rollout.temperature,
            config.rollout.max_new_tokens,
            sample_seed(0, "bench", 0, i),
        )
        for i in indices
    ]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, str(export), stock_options(session), session.inputs.stop_token_ids)
    process = context.Process(target=stock_engine, args=arguments, daemon=True)
    session.engine.sleep()  # on a GPU, frees the KV cache for the other engine; no effect on a CPU
    process.start()
    assert ours.recv() == "ready"

    def stock() -> int:
        ours.send(
            [(list(r.prompt_ids), r.num_samples, r.temperature, r.max_new_tokens, r.seed) for r in requests]
        )
        return ours.recv()

    def wake() -> None:
        session.swap.swap(session.engine, verify="off")

    def colocated() -> int:
        session.engine.reset_prefix_cache()
        return sum(
            len(completion.token_ids) for group in session.engine.generate(requests) for completion in group
        )

    tasks = {
        "colocated": harness.Task(colocated, wake),
        "stock_vllm": harness.Task(stock, session.engine.sleep),
    }
    rates = interleave(tasks, repeats)
    correct["tokens_colocated_vs_stock"] = [rates["colocated"]["tokens"], rates["stock_vllm"]["tokens"]]
    process.kill()
    process.join()
    wake()
    return rates


def stock_options(session: Session) -> dict[str, Any]:
    """Return the settings of the session's engine for a plain `vllm.LLM`."""
    config, settings = session.config, session.engine.settings()
    options: dict[str, Any] = {
        "dtype": config.rollout.dtype or config.model.dtype,
        "max_model_len": session.inputs.max_model_len,
        "max_num_seqs": config.rollout.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": settings.enforce_eager,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
    }
    if session.backend.is_cuda:
        # vLLM only compares it with free memory; the size of the KV cache is set explicitly.
        options |= {"gpu_memory_utilization": 0.02, "compilation_config": PINNED_COMPILATION}
    return options


def stock_engine(
    pipe: Connection, folder: str, options: dict[str, Any], stop_token_ids: Sequence[int]
) -> None:
    """Serve the same requests from a plain `vllm.LLM` with the same settings (on a CPU it packs its weights
    for oneDNN)."""
    quiet_libraries()
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        type(current_platform).simple_compile_backend = "eager"
    # No chunked prefill, as in the colocated engine: a seeded request that is split fails on a CPU.
    llm = LLM(
        model=folder,
        enable_chunked_prefill=False,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        **options,
    )
    pipe.send("ready")
    while True:
        requests = pipe.recv()
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": prompt} for prompt, *_ in requests]
        params = [
            SamplingParams(
                n=n,
                temperature=t,
                max_tokens=m,
                seed=seed,
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for _, n, t, m, seed in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        pipe.send(sum(len(sample.token_ids) for output in outputs for sample in output.outputs))


def compare_training(session: Session, export: Path, repeats: int, correct: dict[str, Any]) -> dict[str, Any]:
    """Time forward+backward of one step's distinct sequences in this trainer and in `transformers`, in
    turn."""
    from transformers import AutoModelForCausalLM

    config, device = session.config, session.backend.device
    rollouts = session.sample(10**6)
    session.engine.sleep()  # both sides train without a KV cache in memory
    sequences = merge_identical(
        rollouts,
        train_end_token=True,
        train_truncated=True,
        stop_token_ids=frozenset(session.inputs.stop_token_ids),
    )
    batches = pack(sequences, config.training.tokens_per_micro_batch)
    objective = WeightedObjective(config.algorithm, len(rollouts))
    tokens = sum(len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in sequences)
    model = AutoModelForCausalLM.from_pretrained(
        export, dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa"
    )
    model = model.to(device)
    model.config.use_cache = False
    padded = pad_by_length(sequences, config.training.tokens_per_micro_batch)
    loss, scores = session.trainer.accumulate_gradients(batches, objective)
    gap = float(scores.token_gaps.double().mean())
    weights = {
        int(i): float(m * w) / len(rollouts)
        for i, m, w in zip(scores.sequence_ids, scores.multiplicity, scores.weights, strict=True)
    }
    weigh: Weigh = lambda _, group: torch.tensor([weights[i] for i in group])  # noqa: E731
    reference = accumulate(model, padded, weigh, session.trainer.log_prob_temperature)
    correct["log_prob_gap_mean"], correct["log_prob_gap_max"] = gap, scores.gap_max
    correct["loss"], correct["loss_transformers"] = float(loss), reference
    assert scores.gap_max < LIMITS[config.model.dtype].largest, (
        f"trainer and engine disagree: {scores.gap_max}"
    )
    difference, tolerance = abs(float(loss) - reference), LOSS_TOLERANCE[config.model.dtype] * abs(reference)
    assert difference < tolerance, (
        f"loss {float(loss)}, transformers {reference}: {difference} apart, more than {tolerance}"
    )

    def ours() -> int:
        session.trainer.accumulate_gradients(batches, objective)
        session.backend.synchronize()
        return tokens

    def theirs() -> int:
        accumulate(model, padded, weigh, session.trainer.log_prob_temperature)
        session.backend.synchronize()
        return tokens

    rates = interleave({"rlsc_mcore": harness.Task(ours), "transformers": harness.Task(theirs)}, repeats)
    rates["rollouts"], rates["distinct_sequences"] = len(rollouts), len(sequences)
    return rates


def interleave(providers: dict[str, harness.Task], repeats: int) -> dict[str, Any]:
    """Time the providers in turn after one untimed call. Return their seconds and the ratios per turn, first
    provider over second."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    tokens = {}
    for name, task in providers.items():
        task.prepare()
        tokens[name] = task.run()
    for turn in range(repeats):
        names = list(providers) if turn % 2 == 0 else list(reversed(providers))
        for name in names:
            providers[name].prepare()
            begin = time.perf_counter()
            providers[name].run()
            seconds[name].append(time.perf_counter() - begin)
    first, second = providers
    ratios = [
        tokens[first] / a / (tokens[second] / b) for a, b in zip(seconds[first], seconds[second], strict=True)
    ]
    result: dict[str, Any] = {
        name: {"tokens": tokens[name], "seconds": [round(s, 4) for s in times]}
        for name, times in seconds.items()
    }
    result["ratio_median"] = round(statistics.median(ratios), 3)
    result["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


def peak_host_bytes() -> int:
    """Return the peak resident set of this process in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def about(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Return command, versions, device and settings of this run."""
    return {
        **harness.about(session.backend.device),
        "versions": versions(),
        "model": session.config.model.path,
        "questions_per_step": session.config.data.questions_per_step,
        "num_samples": session.config.rollout.num_samples,
        "max_new_tokens": session.config.rollout.max_new_tokens,
        "steps": options.steps,
    }


if __name__ == "__main__":
    main()
