"""A comparison on the embedded model that is interrupted goes on where it stopped, and finished runs are left
alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlsc_mcore.evaluation.records import read_answers

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
SMALL = [
    "--training.num-steps",
    "3",
    "--data.questions-per-step",
    "4",
    "--rollout.num-samples",
    "4",
    "--evaluation.max-questions",
    "8",
]


def compare(output: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "rlsc_mcore.cli",
        "compare",
        "--config",
        str(CONFIG),
        "--output",
        str(output),
        "--seeds",
        "0",
    ]
    command += ["--objectives", "rlsc,entropy,lower_temperature", *SMALL]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    process = compare(tmp_path)
    metrics = tmp_path / "entropy_seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while (
        not (metrics.is_file() and metrics.read_text(encoding="utf-8"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the comparison and to its run
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT and "the same command goes on" in said, said
    finished = tmp_path / "rlsc_seed0" / "summary.json"
    when = finished.stat().st_mtime_ns
    steps = len(metrics.read_text(encoding="utf-8").splitlines())
    assert 1 <= steps <= 3 and not (tmp_path / "comparison.json").exists()

    said, _ = (again := compare(tmp_path)).communicate(timeout=600)
    assert again.returncode == 0 and "1 of 3 runs are there already" in said, said
    assert finished.stat().st_mtime_ns == when
    assert [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()] == [
        0,
        1,
        2,
    ]
    rows = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["base", "rlsc", "entropy", "lower_temperature"] and all(
        "accuracy_t1" in row for row in rows.values()
    )
    # One evaluation of the base served both trainings; the colder base answered on its own.
    folders = [tmp_path / f"{name}_seed0" / "evaluation" for name in ("rlsc", "entropy")]
    assert read_answers(folders[0], "before") == read_answers(folders[1], "before") != []
    colder = {
        answer.temperature
        for answer in read_answers(tmp_path / "lower_temperature_seed0" / "evaluation", "after")
    }
    assert colder == {0.0, 0.25, 0.5}
