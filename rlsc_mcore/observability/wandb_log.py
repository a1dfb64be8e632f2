"""Log the numbers of metrics.jsonl to Weights & Biases if a project is configured.

The user has to install the package `wandb`.
"""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, one_line
from rlsc_mcore.run.files import write_atomically

ID_FILE = "wandb_id"
_FIELD = "observability.wandb_project"


def check_wandb(project: str | None) -> None:
    """Raise ConfigError if a project is configured and the package `wandb` is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"{_FIELD}: Weights & Biases is not installed: pip install wandb, or leave {_FIELD} out"
        )


def open_wandb(project: str | None, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """Start the Weights & Biases run, or resume it if `run_dir` holds its id; None without a project.

    WANDB_MODE=offline and the other variables of the package apply. Raises ConfigError if the run cannot
    start (no login, no network).
    """
    if project is None:
        return None
    import wandb

    file = run_dir / ID_FILE
    if not file.is_file():
        write_atomically(file, secrets.token_hex(4))
    try:
        return wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=run_dir,
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # do not capture the terminal output
        )
    except wandb.Error as error:
        said = one_line(error, 1000)
        raise ConfigError(
            f"{_FIELD}: cannot start: {said}; `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
        ) from None
