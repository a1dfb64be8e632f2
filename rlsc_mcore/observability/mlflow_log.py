"""Log the numbers of metrics.jsonl to an MLflow run if an experiment is configured.

The user has to install the package `mlflow` or `mlflow-skinny`.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, one_line
from rlsc_mcore.run.files import write_atomically

ID_FILE = "mlflow_id"
_FIELD = "observability.mlflow_experiment"
_LONGEST_PARAMETER = 500  # characters; servers refuse longer ones
_LARGEST_BATCH = 100  # parameters; MLflow refuses more
# MLflow's own defaults hold up each step for minutes if the server does not answer.
_HTTP_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def check_mlflow(experiment: str | None) -> None:
    """Raise ConfigError if an experiment is configured and the package `mlflow` is not installed."""
    if experiment is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(f"{_FIELD}: MLflow is not installed: pip install mlflow, or leave {_FIELD} out")


class MlflowRun:
    """A run of MLflow. Numbers that the server does not take are sent again with those of the next step."""

    def __init__(self, client: Any, run_id: str, warn: Callable[[str], None]) -> None:
        """`client` is an `MlflowClient`; `warn` prints a line."""
        self._client, self._run_id, self._warn = client, run_id, warn
        self._unsent: list[tuple[dict[str, float], int, int]] = []  # numbers, step, Unix time in ms

    def log(self, data: dict[str, float], step: int) -> None:
        """Send the numbers of one step. An error of the server is a warning, since a run must not end by
        it."""
        self._unsent.append((data, step, int(time.time() * 1000)))
        try:
            self._send()
        except Exception as error:  # of MLflow, requests or the server's database
            self._warn(f"MLflow: step {step + 1} is not logged yet: {one_line(error, 300)}")

    def finish(self) -> None:
        """Send what is left and mark the run as finished."""
        try:
            self._send()
            self._client.set_terminated(self._run_id)
        except Exception as error:
            lost = f"{len(self._unsent)} steps are only in metrics.jsonl"
            self._warn(f"MLflow: the run could not be finished ({lost}): {one_line(error, 300)}")

    def _send(self) -> None:
        from mlflow.entities import Metric

        while self._unsent:
            data, step, now_ms = self._unsent[0]
            metrics = [Metric(name, value, now_ms, step) for name, value in data.items()]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._unsent.pop(0)


def open_mlflow(
    experiment: str | None, run_dir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> MlflowRun | None:
    """Start the MLflow run, or resume it if `run_dir` holds its id; None without an experiment.

    MLFLOW_TRACKING_URI names the server. Raises ConfigError if the run cannot start.
    """
    if experiment is None:
        return None
    for name, value in _HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Param

    file = run_dir / ID_FILE
    try:
        client = MlflowClient()
        if file.is_file():
            run_id = file.read_text(encoding="utf-8").strip()
            client.update_run(run_id, status="RUNNING")
            return MlflowRun(client, run_id, warn)
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
        run_id = client.create_run(experiment_id, run_name=run_dir.resolve().name).info.run_id
        parameters = [Param(name, text[:_LONGEST_PARAMETER]) for name, text in _flat(settings)]
        for start in range(0, len(parameters), _LARGEST_BATCH):
            client.log_batch(run_id, params=parameters[start : start + _LARGEST_BATCH])
    except Exception as error:  # no server, no login, an unknown kind of address
        raise ConfigError(
            f"{_FIELD}: cannot start: {one_line(error, 300)}; set MLFLOW_TRACKING_URI to a server that answers"
        ) from None
    write_atomically(file, run_id)
    return MlflowRun(client, run_id, warn)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, value as text) for every field; nested names are `outer.inner`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
