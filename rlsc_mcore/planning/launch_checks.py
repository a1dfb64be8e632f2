"""Check a run on a login node before GPUs are requested. launch/lib.sh runs this. Imports no torch.

    python -m rlsc_mcore.planning.launch_checks --nodes N --ranks-per-node R [--gpu-memory-gib M] -- TRAINER ARGUMENTS

Prints the facts of the run, one `name<TAB>value` per line. Bad input gives one line on stderr and exit code
2.
"""

import argparse
import importlib.resources
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlsc_mcore.config import Config, ConfigError, check_answers_per_step
from rlsc_mcore.model.shape import Architecture, check_parallel, check_stages, read_architecture
from rlsc_mcore.planning.known_models import find_model, num_parameters
from rlsc_mcore.planning.layouts import USABLE_SHARE
from rlsc_mcore.planning.memory import GIB, config_layout, describe_bytes, rollout_bytes, train_bytes
from rlsc_mcore.run.folder import CONFIG_FILE
from rlsc_mcore.run.owner import refuse_owned
from rlsc_mcore.run.resolve import resolve_training as resolve_training
from rlsc_mcore.run.resolve import split_options

EMBEDDED = "embedded:"
BYTES = {"float32": 4, "bfloat16": 2}
MASTER_AND_MOMENTS_BYTES = 12  # per parameter: fp32 master weight and two Adam moments


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the run and print its facts; return the exit code."""
    parser = argparse.ArgumentParser("rlsc launch checks")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--gpu-memory-gib", type=float)
    parser.add_argument("trainer", nargs=argparse.REMAINDER)
    known = parser.parse_args(arguments)
    trainer = known.trainer[1:] if known.trainer[:1] == ["--"] else known.trainer
    try:
        for name, value in check_launch(trainer, known.nodes, known.ranks_per_node, known.gpu_memory_gib):
            print(f"{name}\t{value}")
    except ConfigError as error:
        print(f"rlsc: error: {error}", file=sys.stderr)
        return 2
    return 0


def check_launch(
    trainer: Sequence[str], nodes: int, ranks_per_node: int, gpu_memory_gib: float | None = None
) -> Iterator[tuple[str, str]]:
    """Check the trainer's arguments for `nodes` x `ranks_per_node` ranks; yield (name, value) facts of the
    run.

    With `gpu_memory_gib`, the memory of one GPU, a `warning` fact reports a layout that does not fit. The
    memory is an estimate, so this is not an error. Raises `ConfigError` at the first invalid setting. Names
    of hub models and data sets are not looked up on the hub.
    """
    options, flags = split_options(trainer, ("--config", "--resume"))
    config, checkpoint = resolve_training(options, flags)
    world, tp = nodes * ranks_per_node, config.parallel.tp
    if world % tp:
        raise ConfigError(
            f"parallel.tp: {tp} does not divide the {world} ranks ({nodes} nodes x {ranks_per_node})"
        )
    pp = config.parallel.pp
    if world % (tp * pp):
        ranks = f"{world} ranks ({nodes} nodes x {ranks_per_node})"
        raise ConfigError(
            f"parallel.pp: parallel.tp {tp} x parallel.pp {pp} = {tp * pp} do not divide the {ranks}"
        )
    dp = world // (tp * pp)
    check_answers_per_step(config, dp)
    architecture = _check_model(config)
    _check_data(config.data.path, "data.path")
    if config.evaluation.path is not None:
        _check_data(config.evaluation.path, "evaluation.path")
    run_dir = Path(config.run_dir).absolute()
    needed = _checkpoint_bytes(config, architecture) if architecture else 0
    _check_run_dir(run_dir, needed)
    if (
        "SLURM_JOB_ID" in os.environ
    ):  # a job is about to use the folder; a dry run may read a folder that is in use
        refuse_owned(run_dir)
    yield "run_dir", str(run_dir)
    yield "model", config.model.path
    yield "data", config.data.path
    stages = f" x pp {pp}" if pp > 1 else ""
    yield (
        "layout",
        f"tp {tp} x dp {dp}{stages}"
        + (f" (tp {tp} spans nodes of {ranks_per_node}: slow)" if tp > ranks_per_node else ""),
    )
    yield "steps", str(config.training.num_steps)
    yield "start", f"resumes {checkpoint}" if checkpoint else "a new run"
    if architecture:
        yield from _memory(config, architecture, dp, gpu_memory_gib)
        yield (
            "checkpoint",
            f"about {needed / 1e9:.1f} GB each, {config.training.keep_last} kept, every "
            f"{config.training.save_every} steps",
        )


def _check_model(config: Config) -> Architecture | None:
    path = config.model.path
    if path.startswith(EMBEDDED):
        folder = Path(str(importlib.resources.files("rlsc_mcore") / "assets" / path.removeprefix(EMBEDDED)))
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir() and _is_hub_name(path):
            return _check_public_model(path, config)
    if not folder.is_dir():
        raise ConfigError(f"model.path: no folder {path}")
    architecture = read_architecture(folder)
    check_parallel(architecture, config.parallel.tp, folder)
    check_stages(architecture, config.parallel, folder)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path: {folder} has no *.safetensors")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"model.path: {folder} has no tokenizer")
    return architecture


def _check_public_model(name: str, config: Config) -> Architecture | None:
    try:
        architecture = find_model(name)
    except ConfigError:
        return None  # the model is downloaded and checked when the run starts
    check_parallel(architecture, config.parallel.tp, Path(name))
    check_stages(architecture, config.parallel, Path(name))
    return architecture


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _check_data(path: str, field: str) -> None:
    if path.startswith(EMBEDDED):
        return
    file = Path(path).expanduser()
    if not file.is_file():
        if _is_hub_name(path) and not file.suffix:
            if importlib.util.find_spec("datasets") is None:
                raise ConfigError(
                    f"{field}: no file {path}; a hub data set needs the package datasets: pip install "
                    "datasets"
                )
            return
        raise ConfigError(f"{field}: no file {path}")
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ConfigError(f"{field}: {path} is empty")
    try:
        record = json.loads(first)
    except ValueError as error:
        raise ConfigError(f"{field}: {path}: the first line is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"problem", "question"} & record.keys():
        raise ConfigError(f"{field}: {path}: the first line has neither `problem` nor `question`")


def _check_run_dir(run_dir: Path, needed_bytes: int) -> None:
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
            f"{needed_bytes / 1e9:.1f} GB"
        )


def _checkpoint_bytes(config: Config, architecture: Architecture) -> int:
    return num_parameters(architecture) * (BYTES[config.model.dtype] + MASTER_AND_MOMENTS_BYTES)


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
