"""Define the file names in a run's folder, find its checkpoints, and delete its files. Imports no torch."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.made_here import files_made

CONFIG_FILE = "config.yaml"
EXPORT_FOLDER = "export"
ADAPTER_FOLDER = "adapter"
SKIPPED_FOLDER = "skipped"  # batches of skipped steps, whose loss or gradient is not finite
METRICS_FILE = "metrics.jsonl"
INPUTS_FILE = "inputs.json"
CPU_FILE = "cpu.json"  # threads and matrix products of a run on a CPU
REFERENCE_FILE = "reference.jsonl"  # log-probs of an offline objective's answers by the starting weights
FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"  # in a checkpoint: size and SHA-256 of each of its other files
CHECKPOINT_HELP = "latest, best (by training.keep_best), or the number of a step that is kept"

_CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")
# Glob patterns of the files that a run writes into its folder.
_WRITTEN = (
    *(
        CONFIG_FILE,
        METRICS_FILE,
        INPUTS_FILE,
        CPU_FILE,
        REFERENCE_FILE,
        "summary.json",
        "status.json*",
        "ending.json",
        "launch.json",
        "*.partial",
    ),
    *("report.html", "report.svg", "report.png", "metrics.partial"),
    *(f"{FOLDER}/step_*", f"{FOLDER}/{LATEST}*", f"{FOLDER}/{BEST}*"),
    *(
        "rollouts/step_*.jsonl*",
        f"{SKIPPED_FOLDER}/step_*.jsonl",
        "evaluation/before*.json*",
        "evaluation/after*.json*",
    ),
    *("tensorboard/events.out.tfevents.*", "wandb/run-*", "wandb/latest-run", "wandb/debug*"),
    *("wandb/offline-run-*", "wandb_id", "mlflow_id"),
)


def config_file(run_dir: Path, option: str = "") -> Path:
    """Return the configuration file of a run; raises `ConfigError` that names `option` if there is no run."""
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{option} {run_dir}: no run there; expected {file}".lstrip())
    return file


def checkpoint_step(path: Path) -> int | None:
    """Return the number of optimizer steps in a checkpoint folder's name, or None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` in ascending order of step.

    Incomplete and set-aside checkpoints have other names and are not returned.
    """
    try:
        steps = [
            (step, path)
            for path in folder.iterdir()
            if (step := checkpoint_step(path)) is not None and path.is_dir()
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(steps)]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint, even if it is damaged, or None if there is none.

    A resume tries this checkpoint first and then the older ones. The file `checkpoints/latest` is only for
    users and scripts and is not read.
    """
    return next(reversed(all_checkpoints(run_dir / FOLDER)), None)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose files all have the sizes given in its manifest, or None."""
    return next((path for path in reversed(all_checkpoints(run_dir / FOLDER)) if _has_all_files(path)), None)


def find_resumable(run_dir: Path) -> Path:
    """Return the checkpoint that a resume tries first; raises `ConfigError` if there is none."""
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ConfigError(f"--resume {run_dir}: no checkpoint there; expected {run_dir / FOLDER}/step_NNNNNN")
    return checkpoint


def find_checkpoint(run_dir: Path, name: str = LATEST) -> Path:
    """Return a run's checkpoint by name: `latest`, `best` (by `training.keep_best`) or a step number.

    Raises `ConfigError` that names `--checkpoint` and the existing checkpoints.
    """
    folder = run_dir / FOLDER
    found: Path | None = None
    if name == LATEST:
        found = latest_checkpoint(run_dir) or newest_checkpoint(run_dir)
    elif name == BEST:
        found = _pointed_at(folder, BEST)
    elif name.isascii() and name.isdecimal() and len(name) < 12:
        found = folder / f"step_{int(name):06d}"
    if found is not None and found.is_dir():
        return found
    steps = [str(checkpoint_step(path)) for path in all_checkpoints(folder)]
    kept = (
        f"; there is {', '.join([LATEST, *([BEST] if _pointed_at(folder, BEST) else []), *steps])}"
        if steps
        else ""
    )
    hint = " (training.keep_best names none)" if name == BEST and steps else ""
    raise ConfigError(f"--checkpoint {name}: no such checkpoint in {folder}{hint}{kept}")


def best_checkpoint_of(run_dir: Path) -> Path | None:
    """Return the checkpoint that `checkpoints/best` names, or None."""
    return _pointed_at(run_dir / FOLDER, BEST)


def delete_run_files(run_dir: Path) -> None:
    """Delete the files of a run from `run_dir`; other files and the folders that contain them are kept."""
    for pattern in _WRITTEN:
        for path in run_dir.glob(pattern):
            _delete(path)
    export = run_dir / EXPORT_FOLDER
    for name in files_made(export) or []:
        _delete(export / name)
    if files_made(export) is not None:
        for path in export.glob(".made_by_rlsc.json"):
            _delete(path)
    for name in (FOLDER, "rollouts", SKIPPED_FOLDER, "evaluation", "tensorboard", "wandb", EXPORT_FOLDER):
        with contextlib.suppress(OSError):  # not empty
            (run_dir / name).rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pointed_at(folder: Path, pointer: str) -> Path | None:
    """Return the checkpoint named in the file `pointer`; None if the file is missing or unreadable, or names
    no checkpoint in `folder`."""
    try:
        name = (folder / pointer).read_text(encoding="utf-8").strip()
        target = folder / name
        return (
            target
            if target.parent == folder and checkpoint_step(target) is not None and target.is_dir()
            else None
        )
    except (OSError, ValueError):
        return None


def _has_all_files(checkpoint: Path) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
