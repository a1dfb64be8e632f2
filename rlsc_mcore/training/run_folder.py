"""A run's folder: its names, whose it is, the rollouts in it, and how a checkpoint is found; imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlsc_mcore.config import Config, ConfigError, changed_fields, dump_config, load_config
from rlsc_mcore.observability.files import write_atomically

if TYPE_CHECKING:
    from rlsc_mcore.parallel.groups import Groups
    from rlsc_mcore.types import Rollout

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
ROLLOUTS = "rollouts"
CHECKPOINT_HELP = "latest, best (by training.keep_best), or the number of a step that is kept"


def claim_run_folder(run_dir: Path, config: Config, groups: "Groups", *, resuming: bool) -> None:
    """Refuse a folder of another run, create ours and write the resolved configuration; collective over the world.

    Raises `ConfigError`: before anything is written where the folder holds another configuration (unless `resuming`), and on
    every rank where it cannot be written.
    """
    file = run_dir / CONFIG_FILE
    if file.is_file() and not resuming:
        changes = changed_fields(load_config(file), config)
        if changes:
            raise ConfigError(f"run_dir: {run_dir} holds a run with another configuration ({'; '.join(changes)}); choose another folder")
    groups.barrier()
    failure = ""
    if groups.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(file, dump_config(config))
        except OSError as error:
            failure = f": {error.strerror}"
    if groups.any(bool(failure)):
        raise ConfigError(f"run_dir: {run_dir} is not writable{failure}")


def write_rollouts(run_dir: Path, step: int, rollouts: "Sequence[Rollout]", groups: "Groups") -> None:
    """Write a step's answers as JSONL, one file per data-parallel rank."""
    if groups.tp_rank:
        return
    folder = run_dir / ROLLOUTS
    folder.mkdir(exist_ok=True)
    rows = (
        {
            "question": rollout.question_index,
            "sample": rollout.sample_index,
            "policy_version": rollout.policy_version,
            "finish_reason": rollout.finish_reason,
            "response_ids": list(rollout.response_ids),
            "text": rollout.text,
            "engine_log_prob": sum(rollout.engine_log_probs),
        }
        for rollout in rollouts
    )
    suffix = f".rank{groups.dp_rank}" if groups.dp_size > 1 else ""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}{suffix}.jsonl", text)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder that `latest` names, or None before the first checkpoint."""
    pointer = run_dir / FOLDER / LATEST
    return run_dir / FOLDER / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def find_resumable(run_dir: Path) -> Path:
    """Return the checkpoint to resume `run_dir` from; raises `ConfigError` when there is none."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise ConfigError(f"--resume {run_dir}: no checkpoint there; expected {run_dir / FOLDER / LATEST}")
    return checkpoint


def find_checkpoint(run_dir: Path, name: str = LATEST) -> Path:
    """Return a run's checkpoint by name: `latest`, `best` (by `training.keep_best`) or the number of its step.

    Raises `ConfigError` naming `--checkpoint` and the checkpoints that there are.
    """
    folder = run_dir / FOLDER
    if name in (LATEST, BEST):
        pointer = folder / name
        found = folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    else:
        found = folder / f"step_{int(name):06d}" if name.isdecimal() else None
    if found is not None and found.is_dir():
        return found
    steps = sorted(path.name.removeprefix("step_").lstrip("0") or "0" for path in folder.glob("step_*") if not path.suffix)
    kept = f"; there is {', '.join([LATEST, *([BEST] if (folder / BEST).is_file() else []), *steps])}" if steps else ""
    hint = " (training.keep_best names none)" if name == BEST and steps else ""
    raise ConfigError(f"--checkpoint {name}: no such checkpoint in {folder}{hint}{kept}")
