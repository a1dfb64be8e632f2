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
the log-probs of trainer and engine must agree, and `transformers` must give the trainer's loss. `ratio` is
tokens/s of this program over those of the other, the median of the rounds. Absolute speeds depend on the
machine and on other processes that use it; quote only ratios and shares.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import MEAN_GAP_LIMIT, Task, command_line, leave, save, take_turns  # noqa: E402
from benchmarks.plain_transformers import Weigh, accumulate, num_tokens, pad_by_length  # noqa: E402
from rlsc_mcore.algorithm.objective import WeightedObjective  # noqa: E402
from rlsc_mcore.config import Config  # noqa: E402
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
    """Run the benchmark and write results/<device>/end_to_end[_<label>].json."""
    options = command_line(
        __doc__,
        flags=True,
        config=(Path("configs/tiny_cpu.yaml"), "configuration of a run; every field of it is an option too"),
        steps=(5, "steps of the loop that are timed, after one that is not"),
        repeats=(5, "interleaved repetitions of each comparison"),
        only=(("phases",), "leave out the comparisons with other engines and trainers"),
        label=("", "added to the name of the result file"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = ["--evaluation.path", "None", "--observability.tensorboard", "False"]
        flags = [*read_flags(options.config), *evaluation, *options.flags, "--run-dir", f"{scratch}/run"]
        session = Session(parse_config(flags), StopRequest())
        facts = about(session.config, options.steps)
        result: dict[str, Any] = {"correct": {}, "phases": time_phases(session, options.steps)}

        def write() -> None:  # after each part, so that an interrupted run keeps its results
            save(__file__, result, session.backend.device, options.out, options.label, **facts)

        write()
        export = Path(scratch) / "export"
        result["correct"]["engine_parameters_equal_export"] = session.export(export)
        if options.only is None:
            for part, compare in (("rollout", compare_rollout), ("train", compare_training)):
                result[part] = compare(session, export, options.repeats, result["correct"])
                write()
        write()
        print(json.dumps(result, indent=1))
        session.close()
    leave()


def about(config: Config, steps: int) -> dict[str, Any]:
    """Return the versions and the settings of this run."""
    return {
        "versions": versions(),
        "model": config.model.path,
        "questions_per_step": config.data.questions_per_step,
        "num_samples": config.rollout.num_samples,
        "max_new_tokens": config.rollout.max_new_tokens,
        "steps": steps,
    }


def time_phases(session: Session, steps: int) -> dict[str, Any]:
    """Run the loop's stages and return median seconds and share of each phase; the first step warms up."""
    rows = []
    for step in range(steps + 1):
        begin = time.perf_counter()
        rollouts = session.sample(step)
        result = session.train(step, rollouts)
        session.hot_swap()
        session.record(step, rollouts, result)
        rows.append({**session.progress.seconds, "whole_step": time.perf_counter() - begin})
    recorded = session.metrics.rows[1:]
    gap = max(row["log_prob_gap_mean"] for row in recorded)
    limit = MEAN_GAP_LIMIT[session.config.model.dtype]
    assert gap < limit, f"trainer and engine disagree by {gap} per token, more than {limit}"
    timed = rows[1:]
    seconds = {name: statistics.median(row[name] for row in timed) for name in timed[0]}
    stages = seconds.keys() - {"whole_step"}
    seconds["other"] = statistics.median(
        row["whole_step"] - sum(row[name] for name in stages) for row in timed
    )
    shares = {name: round(value / seconds["whole_step"], 4) for name, value in seconds.items()}
    del shares["whole_step"]
    rates = ("rollout_tokens_per_s", "train_tokens_per_s")
    answers = session.config.data.questions_per_step * session.config.rollout.num_samples
    return {
        "median_seconds": {name: round(value, 5) for name, value in seconds.items()},
        "share": shares,
        "steps": steps,
        "sampled_tokens": round(statistics.median(row["mean_length"] for row in recorded) * answers),
        **{name: statistics.median(row[name] for row in recorded) for name in rates},
        "log_prob_gap_mean": gap,
        "peak_host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        **device_facts(session, recorded),
    }


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
    requests = [
        SamplingRequest(
            session.inputs.prompts[index],
            config.rollout.num_samples,
            config.rollout.temperature,
            config.rollout.max_new_tokens,
            sample_seed(0, "bench", 0, index),
        )
        for index in session.inputs.sampler.step_indices(0)
    ]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, str(export), stock_options(session), session.inputs.stop_token_ids)
    process = context.Process(target=stock_engine, args=arguments, daemon=True)
    session.engine.sleep()  # on a GPU, frees the KV cache for the other engine; no effect on a CPU
    process.start()
    assert ours.recv() == "ready"

    def stock() -> int:
        ours.send(requests)
        return ours.recv()

    def wake() -> None:
        session.swap.swap(session.engine, verify="off")

    def colocated() -> int:
        session.engine.reset_prefix_cache()
        groups = session.engine.generate(requests)
        return sum(len(completion.token_ids) for group in groups for completion in group)

    tasks = {"colocated": Task(colocated, wake), "stock_vllm": Task(stock, session.engine.sleep)}
    rates = compare_rates(tasks, repeats, session.backend.device)
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
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [
            SamplingParams(
                n=request.num_samples,
                temperature=request.temperature,
                max_tokens=request.max_new_tokens,
                seed=request.seed,
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for request in requests
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
    tokens = sum(map(num_tokens, sequences))
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

    rates = compare_rates({"rlsc_mcore": Task(ours), "transformers": Task(theirs)}, repeats, device)
    rates["rollouts"], rates["distinct_sequences"] = len(rollouts), len(sequences)
    return rates


def compare_rates(tasks: Mapping[str, Task], repeats: int, device: torch.device) -> dict[str, Any]:
    """Time two tasks in turn after one untimed call; each returns its number of tokens. Return the seconds
    and the ratio of tokens/s, first task over second."""
    tokens = {}
    for name, task in tasks.items():
        task.prepare()
        tokens[name] = task.run()
    times = take_turns(tasks, device, 0.0, repeats, time.perf_counter)
    rates = ([tokens[name] / ms for ms in values] for name, values in times.items())
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    result: dict[str, Any] = {
        name: {"tokens": tokens[name], "seconds": [round(ms / 1e3, 4) for ms in values]}
        for name, values in times.items()
    }
    result["ratio"] = round(statistics.median(ratios), 3)
    result["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


if __name__ == "__main__":
    main()
