"""Progress where the output is no terminal: regular lines with what is done, what is left and tokens/s."""

import json
import re
import time
from pathlib import Path

import pytest

from rlsc_mcore.observability.console import Reporter, counted
from rlsc_mcore.run.folder import METRICS_FILE
from rlsc_mcore.run.progress import SECONDS_VARIABLE, Counter, run_line
from rlsc_mcore.run.status import FILE


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "0.05")


def test_lines_come_at_regular_times_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(enabled=True).bar("evaluating, questions", 10) as bar:
        for _ in range(4):
            bar.advance(1, 50)
            time.sleep(0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    numbers = [
        re.match(r"evaluating, questions: (\d+) of 10 done, (\d+) left, \d+ tokens/s", line) for line in lines
    ]
    done = [int(match[1]) for match in numbers if match]
    assert len(done) == len(lines) and done == sorted(done) and done[-1] == 4
    assert all(int(match[1]) + int(match[2]) == 10 for match in numbers if match)


def test_short_work_and_other_ranks_print_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reporter(enabled=False).bar("work", 1):
        time.sleep(0.15)
    monkeypatch.setenv(SECONDS_VARIABLE, "30")
    with Reporter(enabled=True).bar("work", 1):
        pass
    assert capsys.readouterr().out == ""


def test_work_of_unknown_size_tells_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(enabled=True).bar("exporting, tensors") as bar:
        assert list(counted([1, 2], bar)) == [1, 2]
        time.sleep(0.15)
    assert capsys.readouterr().out.startswith("exporting, tensors: for ")


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    counter = Counter("training", 8, tokens_each=30.0)
    counter.advance(2)
    clock[0] += 12.0
    assert counter.line() == "training: 2 of 8 done, 6 left, 5 tokens/s, for 12 s, about 36 s to go"


def test_a_child_run_is_described_from_its_files(tmp_path: Path) -> None:
    assert run_line(tmp_path, "rlsc, seed 0") == "rlsc, seed 0: starting"
    status = {"state": "running", "phase": "train", "steps_done": 3, "num_steps": 5}
    (tmp_path / FILE).write_text(json.dumps(status))
    row = {"step": 2, "rollout_tokens_per_s": 41.6, "train_tokens_per_s": 80.2, "seconds": {"train": 7.0}}
    (tmp_path / METRICS_FILE).write_text(json.dumps(row) + "\n")
    assert run_line(tmp_path, "rlsc, seed 0") == (
        "rlsc, seed 0: train, step 3 of 5 done, 2 left, rollout 42 and training 80 tokens/s, "
        "about 14 s of training to go"
    )
