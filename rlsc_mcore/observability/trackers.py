"""Experiment trackers that receive the numbers of metrics.jsonl: Weights & Biases and MLflow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlsc_mcore.config import ObservabilityConfig
from rlsc_mcore.observability.mlflow_log import check_mlflow, open_mlflow
from rlsc_mcore.observability.wandb_log import check_wandb, open_wandb


class Tracker(Protocol):
    """The run of a tracker."""

    def log(self, data: dict[str, float], step: int) -> None:
        """Record numbers by name for the step with index `step`."""

    def finish(self) -> None:
        """Mark the run as ended and send what is left."""


def check_trackers(config: ObservabilityConfig) -> None:
    """Raise ConfigError if the package of a configured tracker is not installed."""
    check_wandb(config.wandb_project)
    check_mlflow(config.mlflow_experiment)


def open_trackers(
    config: ObservabilityConfig, run_dir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> list[Tracker]:
    """Start or resume the run of every configured tracker; raises ConfigError if one cannot start.

    Call it on the main rank only. `settings` is the configuration that the trackers show.
    """
    found = [
        open_wandb(config.wandb_project, run_dir, settings),
        open_mlflow(config.mlflow_experiment, run_dir, settings, warn),
    ]
    return [tracker for tracker in found if tracker is not None]
