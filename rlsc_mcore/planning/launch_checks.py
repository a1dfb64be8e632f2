"""Check a run on a login node before GPUs are requested. launch/lib.sh runs this. Imports no torch.

    python -m rlsc_mcore.planning.launch_checks --nodes N --ranks-per-node R [--gpu-memory-gib M] -- TRAINER ARGUMENTS

Prints the facts of the run, one `name<TAB>value` per line. Each failed check gives one line on stderr; the
exit code is then 2.
"""

import argparse
import contextlib
import importlib.resources
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlsc_mcore.config import Config, ConfigError, check_answers_per_step
from rlsc_mcore.model.shape import Architecture, check_parallel, check_stages, read_architecture
from rlsc_mcore.planning.downloads import download_facts, is_hub_name
from rlsc_mcore.planning.known_models import find_model
from rlsc_mcore.planning.layouts import USABLE_SHARE
from rlsc_mcore.planning.memory import (
    GIB,
    checkpoint_bytes,
    config_layout,
    describe_bytes,
    rollout_bytes,
    train_bytes,
)
from rlsc_mcore.run.folder import CONFIG_FILE
from rlsc_mcore.run.owner import refuse_owned
from rlsc_mcore.run.resolve import resolve_training as resolve_training
from rlsc_mcore.run.resolve import split_options

EMBEDDED = "embedded:"
_EMBEDDED_QUESTIONS = Path(str(importlib.resources.files("rlsc_mcore") / "assets" / "questions"))
Result = TypeVar("Result")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the run and print its facts and every failed check; return the exit code."""
    parser = argparse.ArgumentParser("rlsc launch checks")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--gpu-memory-gib", type=float)
    parser.add_argument("--downloads", action="store_true", help="also tell what the run will download")
    parser.add_argument("trainer", nargs=argparse.REMAINDER)
    known = parser.parse_args(arguments)
    trainer = known.trainer[1:] if known.trainer[:1] == ["--"] else known.trainer
    try:
        options, flags = split_options(trainer, ("--config", "--resume"))
        config, checkpoint = resolve_training(options, flags)
    except ConfigError as error:  # without a configuration there is nothing else to check
        print(f"rlsc: error: {error}", file=sys.stderr)
        return 2
    report = check_launch(config, checkpoint, known.nodes, known.ranks_per_node, known.gpu_memory_gib)
    facts = [*report.facts, *(download_facts(config) if known.downloads else [])]
    for name, value in facts:
        print(f"{name}\t{value}")
    for problem in report.problems:
        print(f"rlsc: error: {problem}", file=sys.stderr)
    return 2 if report.problems else 0


@dataclass
class LaunchReport:
    """The facts of a run as (name, value), and one line for each failed check."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return `function(*arguments)`; None if it raises `ConfigError`, which becomes a problem."""
        try:
            return function(*arguments)
        except ConfigError as error:
            self.problems.append(str(error))
            return None


def check_launch(
    config: Config,
    checkpoint: Path | None,
    nodes: int,
    ranks_per_node: int,
    gpu_memory_gib: float | None = None,
) -> LaunchReport:
    """Check a configuration for `nodes` x `ranks_per_node` ranks. A failed check does not end the others.

    With `gpu_memory_gib`, the memory of one GPU, a `warning` fact reports a layout that does not fit. The
    memory is an estimate, so this is not a problem. Names of hub models and data sets are not looked up on
    the hub.
    """
    report = LaunchReport()
    dp = report.check(_data_parallel_size, config, nodes, ranks_per_node)
    if dp is not None:
        report.check(check_answers_per_step, config, dp)
    architecture = check_model(report, config, layout=dp is not None)
    check_questions(report, config)
    run_dir = Path(config.run_dir).absolute()
    needed = 0
    if architecture is not None and dp is not None:
        needed = checkpoint_bytes(architecture, config_layout(config, config.parallel.tp, dp))
    report.check(check_run_dir, run_dir, needed)
    if (
        "SLURM_JOB_ID" in os.environ
    ):  # a job is about to use the folder; a dry run may read a folder that is in use
        report.check(refuse_owned, run_dir)
    report.facts += [("run_dir", str(run_dir)), ("model", config.model.path), ("data", config.data.path)]
    if dp is not None:
        report.facts.append(("layout", _describe_layout(config, dp, ranks_per_node)))
    report.facts.append(("steps", str(config.training.num_steps)))
    report.facts.append(("start", f"resumes {checkpoint}" if checkpoint else "a new run"))
    if architecture is not None and dp is not None:
        report.facts += _memory(config, architecture, dp, gpu_memory_gib)
        options = config.training
        every = f"{options.keep_last} kept, every {options.save_every} steps"
        report.facts.append(("checkpoint", f"about {needed / 1e9:.1f} GB each, {every}"))
    return report


def check_model(report: LaunchReport, config: Config, *, layout: bool = True) -> Architecture | None:
    """Check the model, and the parallel layout if `layout`; return the model's shape if it is known."""
    architecture = report.check(_check_model, config)
    if architecture is not None and layout:
        report.check(_check_layout, config, architecture)
    return architecture


def check_questions(report: LaunchReport, config: Config) -> None:
    """Check the questions of training and evaluation; reads one line of each file."""
    report.check(_check_data, config.data.path, "data.path")
    if config.evaluation.path is not None:
        report.check(_check_data, config.evaluation.path, "evaluation.path")


def _data_parallel_size(config: Config, nodes: int, ranks_per_node: int) -> int:
    world, tp, pp = nodes * ranks_per_node, config.parallel.tp, config.parallel.pp
    ranks = f"{world} ranks ({nodes} nodes x {ranks_per_node})"
    if world % tp:
        raise ConfigError(f"parallel.tp: {tp} does not divide the {ranks}")
    if world % (tp * pp):
        raise ConfigError(
            f"parallel.pp: parallel.tp {tp} x parallel.pp {pp} = {tp * pp} do not divide the {ranks}"
        )
    return world // (tp * pp)


def _describe_layout(config: Config, dp: int, ranks_per_node: int) -> str:
    tp, pp = config.parallel.tp, config.parallel.pp
    stages = f" x pp {pp}" if pp > 1 else ""
    slow = f" (tp {tp} spans nodes of {ranks_per_node}: slow)" if tp > ranks_per_node else ""
    return f"tp {tp} x dp {dp}{stages}{slow}"


def _check_layout(config: Config, architecture: Architecture) -> None:
    folder = Path(config.model.path)
    check_parallel(architecture, config.parallel.tp, folder)
    check_stages(architecture, config.parallel, folder)


def _check_model(config: Config) -> Architecture | None:
    path = config.model.path
    if path.startswith(EMBEDDED):
        folder = Path(str(importlib.resources.files("rlsc_mcore") / "assets" / path.removeprefix(EMBEDDED)))
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir() and is_hub_name(path):
            with contextlib.suppress(ConfigError):  # else it is checked when the run has downloaded it
                return find_model(path)
            return None
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: no folder {path}; give a model folder, embedded:tiny_qwen2, or OWNER/NAME of the hub"
        )
    architecture = read_architecture(folder)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path: {folder} has no *.safetensors")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"model.path: {folder} has no tokenizer")
    return architecture


def _check_data(path: str, name: str) -> None:
    if path.startswith(EMBEDDED):
        sets = sorted(_EMBEDDED_QUESTIONS.glob("*.jsonl"))
        known = ", ".join(EMBEDDED + file.stem for file in sets)
        if path.removeprefix(EMBEDDED) not in [file.stem for file in sets]:
            raise ConfigError(f"{name}: expected one of {known}, got {path!r}")
        return
    file = Path(path).expanduser()
    if not file.is_file():
        if is_hub_name(path) and not file.suffix:
            if importlib.util.find_spec("datasets") is None:
                raise ConfigError(
                    f"{name}: no file {path}; a hub data set needs the package datasets: pip install datasets"
                )
            return
        raise ConfigError(
            f"{name}: no file {path}; give a JSONL file, {EMBEDDED}train, or OWNER/NAME of the hub"
        )
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ConfigError(f"{name}: {path} is empty")
    try:
        record = json.loads(first)
    except ValueError as error:
        raise ConfigError(f"{name}: {path}: the first line is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"problem", "question"} & record.keys():
        raise ConfigError(f"{name}: {path}: the first line has neither `problem` nor `question`")


def check_run_dir(run_dir: Path, needed_bytes: int = 0) -> None:
    """Raise `ConfigError` if the run folder cannot be written or has not `needed_bytes` of free space."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run_dir: {run_dir} cannot be written ({existing} is no folder that you may write to)"
        )
    if run_dir.is_dir() and not (run_dir / CONFIG_FILE).is_file() and any(run_dir.glob("*.safetensors")):
        raise ConfigError(f"run_dir: {run_dir} is a model folder, not a run's; choose another")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ConfigError(
            f"run_dir: {free / 1e9:.1f} GB free in {existing}, one checkpoint takes about "
            f"{needed_bytes / 1e9:.1f} GB; make room, or choose another --run-dir"
        )


def _memory(
    config: Config, architecture: Architecture, dp: int, gpu_memory_gib: float | None
) -> Iterator[tuple[str, str]]:
    """Yield the memory of this layout as `rlsc plan` counts it, and a warning if it does not fit.

    Without `rollout.kv_cache_gib` the KV cache is not counted.
    """
    layout = config_layout(config, config.parallel.tp, dp)
    cache = int((config.rollout.kv_cache_gib or 0) * GIB)
    needs = {
        "training": train_bytes(architecture, layout),
        "rollout": rollout_bytes(architecture, layout, cache),
    }
    for phase, parts in needs.items():
        if not parts.get("KV cache", 1):
            del parts["KV cache"]
        more = " (and the KV cache)" if phase == "rollout" and not cache else ""
        yield "memory", f"{phase} {describe_bytes(parts)}{more}"
    peak = max(sum(parts.values()) for parts in needs.values())
    if gpu_memory_gib is not None and peak > gpu_memory_gib * GIB * USABLE_SHARE:
        usable = f"{gpu_memory_gib * USABLE_SHARE:.1f} of {gpu_memory_gib:g} are usable (GPU_MEMORY_GIB)"
        remedy = "raise TP or --training.recompute, lower --training.tokens-per-micro-batch; rlsc plan shows what fits"
        yield "warning", f"needs {peak / GIB:.1f} GiB, {usable}: {remedy}"


if __name__ == "__main__":
    sys.exit(main())
