"""`rlsc plan`: estimate memory, communication and seconds per GPU before a run; `rlsc train --dry-run` plans
a
configuration. Imports no torch."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from rlsc_mcore.config import Config, ConfigError, LoraConfig
from rlsc_mcore.model.shape import Architecture, check_stages
from rlsc_mcore.planning.downloads import download_facts
from rlsc_mcore.planning.known_models import MODELS, find_model, num_parameters
from rlsc_mcore.planning.launch_checks import LaunchReport, check_model, check_questions, check_run_dir
from rlsc_mcore.planning.layouts import Candidate, candidates
from rlsc_mcore.planning.memory import GIB, Layout, config_layout, describe_bytes, host_bytes
from rlsc_mcore.planning.timing import GPUS, Work, communication_bytes


def run_plan(arguments: Sequence[str]) -> int:
    """Run `rlsc plan`: print the layouts that fit and the fastest one.

    Returns 0 if a layout fits, else 1. Needs no GPU.
    """
    parser = argparse.ArgumentParser(
        "rlsc plan", description="Plan memory and layout of a run; needs no GPU."
    )
    parser.add_argument("--model", required=True, help=f"folder, config.json, or one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu-memory-gib", type=float, required=True, help="memory of one GPU")
    parser.add_argument("--gpu", choices=list(GPUS), help="speeds to estimate with (default: by the memory)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="largest tensor-parallel size")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="model.dtype")
    parser.add_argument(
        "--tokens-per-micro-batch", type=int, default=16384, help="training.tokens_per_micro_batch"
    )
    parser.add_argument("--questions-per-step", type=int, default=64, help="data.questions_per_step")
    parser.add_argument("--num-samples", type=int, default=16, help="rollout.num_samples")
    parser.add_argument("--max-new-tokens", type=int, default=3072, help="rollout.max_new_tokens")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of a typical prompt")
    parser.add_argument(
        "--response-tokens", type=int, help="tokens of a typical answer (default: a third of the longest)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="rollout.max_num_seqs")
    parser.add_argument("--engine-tp", type=int, help="rollout.tp (default: the best for each layout)")
    parser.add_argument("--pp", type=int, help="parallel.pp (default: the best for each layout)")
    parser.add_argument(
        "--precision-aware", action="store_true", help="optimizer.precision_aware: moments in bfloat16"
    )
    parser.add_argument(
        "--cpu-offload", type=float, help="optimizer.cpu_offload: share of the optimizer's state on the host"
    )
    parser.add_argument(
        "--offload-during-rollout", action="store_true", help="optimizer.offload_during_rollout"
    )
    parser.add_argument("--lora-rank", type=int, help="lora.rank: train adapters of all projections only")
    known = parser.parse_args(arguments)
    for name, value in vars(known).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    work = Work(
        known.questions_per_step * known.num_samples,
        known.prompt_tokens,
        known.response_tokens or max(1, known.max_new_tokens // 3),
        known.max_new_tokens,
        known.max_num_seqs,
    )
    if (known.cpu_offload or 0) > 1:
        raise ConfigError(f"--cpu-offload: expected a share, at most 1, got {known.cpu_offload}")
    if known.precision_aware and known.dtype != "bfloat16":
        raise ConfigError("--precision-aware: expected --dtype bfloat16 with it")
    if known.cpu_offload and (known.precision_aware or known.offload_during_rollout):
        raise ConfigError(
            "--cpu-offload: expected neither --precision-aware nor --offload-during-rollout with it"
        )
    layout = Layout(
        1,
        1,
        dtype=known.dtype,
        tokens_per_micro_batch=known.tokens_per_micro_batch,
        precision_aware=known.precision_aware,
        cpu_offload=known.cpu_offload or 0.0,
        engine_tp=known.engine_tp,
        offload_during_rollout=known.offload_during_rollout,
        lora=LoraConfig(rank=known.lora_rank or 0),
    )
    return _print_plan(
        find_model(known.model),
        known.model,
        layout,
        work,
        known.gpu,
        known.gpus,
        known.gpu_memory_gib,
        known.gpus_per_node,
        known.pp,
    )


def dry_run(config: Config, gpus: str | None, gpu_memory_gib: str | None) -> int:
    """Run `rlsc train --dry-run`: print the plan, the downloads and every failed check.

    Returns 0; 1 if the layout does not fit; 2 if a check failed.
    """
    report = LaunchReport()
    code = report.check(dry_run_config, config, gpus, gpu_memory_gib) or 0
    check_model(report, config, layout=False)  # the plan checked it
    check_questions(report, config)
    report.check(check_run_dir, Path(config.run_dir).absolute())
    for name, value in download_facts(config):
        print(f"{name}: {value}")
    for problem in report.problems:
        print(f"rlsc train: {problem}", file=sys.stderr)
    return 2 if report.problems else code


def dry_run_config(config: Config, gpus: str | None, gpu_memory_gib: str | None) -> int:
    """Print the plan of a configuration; return 0 if its layout fits, else 1.

    Default number of GPUs: WORLD_SIZE, at least parallel.tp x parallel.pp. Default memory: that of this
    machine's first GPU, else 80 GiB.
    """
    ranks = config.parallel.tp * config.parallel.pp
    started = max(ranks, int(os.environ.get("WORLD_SIZE", "1")))
    num_gpus = _positive("--gpus", gpus, started)
    memory_gib = _positive("--gpu-memory-gib", gpu_memory_gib, _installed_gib() or 80.0)
    if num_gpus % config.parallel.tp:
        raise ConfigError(f"parallel.tp: {config.parallel.tp} does not divide {num_gpus:g} GPUs")
    if num_gpus % ranks:
        raise ConfigError(f"parallel.pp: parallel.tp x parallel.pp = {ranks} do not divide {num_gpus:g} GPUs")
    shape = find_model(_local(config.model.path))
    check_stages(shape, config.parallel, Path(config.model.path))
    return _plan_config(config, shape, int(num_gpus), memory_gib)


def _positive(name: str, text: str | None, default: float) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"{name}: expected a number, more than 0, got {text!r}")
    return value


def _installed_gib() -> float | None:
    """Return the memory of this machine's first GPU in GiB, or None without a GPU."""
    with contextlib.suppress(Exception):  # no driver, no library, no GPU
        import pynvml

        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total / GIB)
    return None


def _local(path: str) -> str:
    """Return the folder of an embedded model; other paths and names are returned unchanged."""
    return (
        str(resources.files("rlsc_mcore") / "assets" / path.removeprefix("embedded:"))
        if path.startswith("embedded:")
        else path
    )


def _plan_config(config: Config, shape: Architecture, num_gpus: int, gpu_memory_gib: float) -> int:
    rollout, training = config.rollout, config.training
    num_rollouts = config.data.questions_per_step * rollout.num_samples
    work = Work(
        num_rollouts, 256, max(1, rollout.max_new_tokens // 3), rollout.max_new_tokens, rollout.max_num_seqs
    )
    layout = config_layout(config, config.parallel.tp, num_gpus // (config.parallel.tp * config.parallel.pp))
    chosen = (config.parallel.tp, training.recompute)
    return _print_plan(
        shape,
        config.model.path,
        layout,
        work,
        None,
        num_gpus,
        gpu_memory_gib,
        8,
        pp=config.parallel.pp,
        chosen=chosen,
    )


def _print_plan(
    shape: Architecture,
    name: str,
    layout: Layout,
    work: Work,
    gpu_name: str | None,
    num_gpus: int,
    memory_gib: float,
    gpus_per_node: int,
    pp: int | None = None,
    chosen: tuple[int, str] | None = None,
) -> int:
    gpu = GPUS[
        gpu_name
        or (
            "a100"
            if memory_gib < 79
            else "h100"
            if memory_gib < 100
            else "h200"
            if memory_gib < 160
            else "b200"
        )
    ]

    def consider(base: Layout) -> list[Candidate]:
        return candidates(
            shape,
            base,
            work,
            gpu,
            num_gpus=num_gpus,
            gpu_bytes=int(memory_gib * GIB),
            gpus_per_node=gpus_per_node,
            pp=pp,
            searches_offload=chosen is None,
        )

    found = consider(layout)
    print(
        f"{name}: {num_parameters(shape) / 1e9:.2f} B parameters, {layout.dtype}; {num_gpus} x {gpu.name} "
        f"with {memory_gib:g} GiB"
    )
    print(
        f"{work.num_rollouts} answers per step, prompt {work.prompt_tokens}, answers {work.response_tokens} "
        "on average and at most "
        f"{work.longest_response} tokens; {layout.tokens_per_micro_batch} tokens per micro-batch"
    )
    print(
        f"\n{'tp':>3} {'pp':>3} {'dp':>4} {'engine tp':>9} {'recompute':>10} {'training':>9} {'rollout':>8} {'s/step':>7}"
    )
    for candidate in found:
        print(_row(candidate))
    fits = [c for c in found if not c.why_not]
    shown = (
        next((c for c in found if chosen == (c.layout.tp, c.layout.recompute)), None)
        if chosen
        else (fits[0] if fits else None)
    )
    if shown is None:
        print("\nnothing fits: use more GPUs, lower --tokens-per-micro-batch or --max-new-tokens")
        for flags, base in _remedies(layout, work):
            best = consider(base)[0]
            if not best.why_not:
                print(f"with {flags} {_describe_layout(best.layout)} fits:")
                print(
                    f"  training: {describe_bytes(best.training)}\n  rollout: {describe_bytes(best.rollout)}"
                )
                break
        return 1
    title = "this configuration" if chosen else "best"
    print(f"\n{title}: {_describe_layout(shown.layout)}")
    for phase, parts in (("training", shown.training), ("rollout", shown.rollout)):
        print(f"  {phase}: {describe_bytes(parts)}")
    on_host = ", ".join(
        f"{reason} {size / GIB:.2f}" for reason, size in host_bytes(shape, shown.layout).items()
    )
    print(f"  host memory per GPU, GiB: {on_host}")
    moved = ", ".join(
        f"{group} {size / GIB:.2f}" for group, size in communication_bytes(shape, shown.layout, work).items()
    )
    print(f"  moved per GPU and step, GiB: {moved}")
    print(
        "  estimated seconds: "
        + ", ".join(
            f"{phase} {value:.1f}" for phase, value in shown.seconds.items() if value or phase == "swap"
        )
    )
    print(
        "Memory is counted from shapes (within 10 % of the measured peak on a CPU); seconds are estimates "
        "for comparing layouts."
    )
    if shown.why_not:
        print(f"does not fit: {shown.why_not}")
    return 1 if shown.why_not else 0


def _remedies(layout: Layout, work: Work) -> Iterator[tuple[str, Layout]]:
    """Yield changes that save memory on the same GPUs as (flags, layout), the least costly first.

    In this order: smaller micro-batches, moments in bfloat16, moments on the host. Each change is combined
    with the options already set; combinations that are not allowed are left out.
    """
    shortest = work.prompt_tokens + work.longest_response  # a micro-batch must hold one whole sequence
    small = replace(layout, tokens_per_micro_batch=min(layout.tokens_per_micro_batch, shortest))
    flags = f"--tokens-per-micro-batch {small.tokens_per_micro_batch}"
    yield flags, small
    if layout.dtype == "bfloat16" and not layout.cpu_offload:
        yield f"{flags} --precision-aware", replace(small, precision_aware=True)
    for share in (0.5, 1.0) if not (layout.precision_aware or layout.offload_during_rollout) else ():
        if layout.cpu_offload < share:
            yield f"{flags} --cpu-offload {share:g}", replace(small, cpu_offload=share)


def _describe_layout(layout: Layout) -> str:
    """Return the layout as options: tp and recompute always, the others if they differ from the default."""
    named = [f"parallel.tp {layout.tp}"]
    if layout.pp > 1:
        named.append(f"parallel.pp {layout.pp}")
    if layout.engine_ranks != layout.tp:
        named.append(f"rollout.tp {layout.engine_ranks}")
    if layout.offload_during_rollout:
        named.append("optimizer.offload_during_rollout True")
    return ", ".join([*named, f"training.recompute {layout.recompute}"])


def _row(candidate: Candidate) -> str:
    layout = candidate.layout
    sizes = f"{sum(candidate.training.values()) / GIB:9.1f} {sum(candidate.rollout.values()) / GIB:8.1f}"
    seconds = "-" if candidate.why_not else f"{candidate.step_seconds:.1f}"
    end = (
        f"  does not fit: {candidate.why_not}"
        if candidate.why_not
        else "  offload"
        if layout.offload_during_rollout
        else ""
    )
    return f"{layout.tp:3} {layout.pp:3} {layout.dp:4} {layout.engine_ranks:9} {layout.recompute:>10} {sizes} {seconds:>7}{end}"
