"""A run's folder: its names, whose it is, the rollouts in it, and how a checkpoint is found; imports no torch."""

from pathlib import Path

from rlsc_mcore.config import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
CHECKPOINT_HELP = "latest, best (by training.keep_best), or the number of a step that is kept"


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
