"""MLflow: refused with a reason where it is absent; where it is installed, a real store holds the numbers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.observability.mlflow_log import ID_FILE, MlflowRun, check_mlflow, open_mlflow

ROWS: list[dict[str, Any]] = [
    {"step": step, "loss": 0.5 - step, "seconds": {"train": 1.5}, "warnings": ["x"], "skipped": False}
    for step in range(3)
]
WRITE = """
import json, pathlib, sys
from rlsc_mcore.observability.metrics import MetricsWriter
from rlsc_mcore.observability.mlflow_log import open_mlflow
folder, rows = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
settings = {"optimizer": {"lr": 0.25}, "text": "x" * 10_000, **{f"field_{i}": i for i in range(250)}}
run = open_mlflow("rlsc-test", folder, settings, print)
writer = MetricsWriter(folder, first_step=rows[0]["step"], enabled=True, tensorboard=False, trackers=[run])
for row in rows:
    writer.write(row)
writer.close()
"""
OPEN = "import pathlib, sys; from rlsc_mcore.observability import mlflow_log; mlflow_log.open_mlflow('p', pathlib.Path(sys.argv[1]), {}, print)"


class Unreachable:
    """A client whose server answers only from the call with number `first` on."""

    def __init__(self, first: int) -> None:
        self.first, self.calls, self.steps, self.ended = first, 0, [], False

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.calls += 1
        if self.calls < self.first:
            raise ConnectionError("refused\nby the server")
        self.steps += [(metric.step, metric.key, metric.value) for metric in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.ended = True


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="MLflow is installed")
def test_absence_is_named_only_where_it_is_asked_for() -> None:
    check_mlflow(None)
    with pytest.raises(
        ConfigError, match=r"^observability\.mlflow_experiment: .*pip install mlflow"
    ) as error:
        check_mlflow("mine")
    assert "\n" not in str(error.value)


def test_no_experiment_is_no_run(tmp_path: Path) -> None:
    assert open_mlflow(None, tmp_path, {}, print) is None and not list(tmp_path.iterdir())


def test_a_run_and_its_resume_are_one_run_of_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    run_dir, store = tmp_path / "mine", (tmp_path / "store").as_uri()
    run_dir.mkdir()
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"}
    for rows in (ROWS[:2], ROWS[2:]):  # begun, and resumed by another process
        command = [sys.executable, "-c", WRITE, str(run_dir), json.dumps(rows)]
        done = subprocess.run(
            command, check=True, env=environment, capture_output=True, text=True, timeout=120
        )
        assert "MLflow" not in done.stdout
    (folder,) = (tmp_path / "store").glob("*/" + (run_dir / ID_FILE).read_text(encoding="utf-8"))
    lines = [line.split() for line in (folder / "metrics" / "loss").read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in lines] == [(0, 0.5), (1, -0.5), (2, -1.5)]
    assert [line.split()[1] for line in (folder / "metrics/seconds/train").read_text().splitlines()] == [
        "1.5"
    ] * 3
    assert {file.name for file in (folder / "metrics").iterdir()} == {"loss", "seconds"}
    assert (folder / "params" / "optimizer.lr").read_text() == "0.25"
    assert len(list((folder / "params").iterdir())) == 252
    assert re.search(r"^status: 3$", (folder / "meta.yaml").read_text(), re.MULTILINE)  # finished
    assert "run_name: mine" in (folder / "meta.yaml").read_text()


def test_a_server_that_does_not_answer_is_a_message(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    ended = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)],
        check=False,
        env=os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = r"ConfigError: observability\.mlflow_experiment: cannot start: \S.*set MLFLOW_TRACKING_URI"
    assert re.search(message, ended.stderr), ended.stderr
    assert not list(tmp_path.iterdir())


def test_numbers_are_sent_again_once_the_server_answers() -> None:
    pytest.importorskip("mlflow")
    client, lines = Unreachable(first=3), list[str]()
    run = MlflowRun(client, "id", lines.append)
    for step in range(3):
        run.log({"loss": float(step)}, step=step)
    assert client.steps == [(step, "loss", float(step)) for step in range(3)] and len(lines) == 2
    assert lines[0] == "MLflow: step 1 is not logged yet: refused by the server"
    run.finish()
    assert client.ended


def test_a_server_that_is_gone_does_not_end_the_run() -> None:
    pytest.importorskip("mlflow")
    client, lines = Unreachable(first=99), list[str]()
    run = MlflowRun(client, "id", lines.append)
    run.log({"loss": 1.0}, step=0)
    run.finish()
    assert "1 steps are only in metrics.jsonl" in lines[-1] and not client.ended
