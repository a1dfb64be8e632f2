"""metrics.jsonl: appended, cut where a run resumes, read past a half-written end; and what raises an alarm."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.observability.metrics import MetricsWriter, PhaseTimer, alarms, read_metrics
from rlsc_mcore.run.folder import METRICS_FILE


def rows(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 0.5 - step, "seconds": {"train": 1.5}, "warnings": [], "skipped": False} for step in range(count)]


def write(folder: Path, entries: list[dict[str, Any]], *, first_step: int = 0, tensorboard: bool = False) -> MetricsWriter:
    writer = MetricsWriter(folder, first_step=first_step, enabled=True, tensorboard=tensorboard)
    for row in entries:
        writer.write(row)
    writer.close()
    return writer


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path, rows(3))
    assert read_metrics(tmp_path) == rows(3)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()] == [0, 1, 2]


def test_no_file_is_no_row(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    write(tmp_path, rows(3))
    file = tmp_path / METRICS_FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert read_metrics(tmp_path) == rows(3 if cut == 1 else 2)
    writer = write(tmp_path, rows(4)[3:], first_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 3] == [row["step"] for row in writer.rows]


def test_resuming_drops_the_rows_of_steps_to_be_repeated(tmp_path: Path) -> None:
    write(tmp_path, rows(5))
    resumed = write(tmp_path, [{"step": 2, "loss": 9.0}], first_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert read_metrics(tmp_path)[-1]["loss"] == 9.0
    assert resumed.rows[0] == rows(1)[0]  # the alarms still compare with the run's first step


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, enabled=False, tensorboard=True)
    writer.write(rows(1)[0])
    writer.close()
    assert list(tmp_path.iterdir()) == [] and writer.rows == rows(1)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    write(tmp_path, rows(2), tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
            found[event.step, value.tag] = number
    assert found == {
        (step, name): pytest.approx(value) for step in range(2) for name, value in (("loss", 0.5 - step), ("seconds/train", 1.5))
    }


FIRST = {"mean_length": 100.0, "f_estimate": 0.1, "distinct_share": 0.8, "truncated_share": 0.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"mean_length": 50.0}, None),
        ({"mean_length": 49.0}, "length collapse: answers average 49.0 tokens, 100.0 at the first step"),
        ({"f_estimate": 0.3}, None),
        ({"distinct_share": 0.1}, None),
        ({"f_estimate": 0.3, "distinct_share": 0.39}, "diversity loss: F rose from 0.1 to 0.3 while distinct answers fell from 80% to 39%"),
        ({"truncated_share": 0.9}, None),
        ({"truncated_share": 0.95}, "95% of the answers were cut at rollout.max_new_tokens"),
    ],
)
def test_alarms(change: dict[str, float], named: str | None) -> None:
    found = alarms(FIRST | change, FIRST)
    assert len(found) == (named is not None)
    assert named is None or found[0].startswith(named)


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr("rlsc_mcore.observability.metrics.perf_counter", lambda: next(clock))
    waited = []
    timer = PhaseTimer(lambda: waited.append(1))
    for name in ("train", "swap", "train"):
        with timer.phase(name):
            pass
    assert timer.seconds == {"train": 2.25, "swap": 1.5}
    assert len(waited) == 3  # the clock stops after the device has
