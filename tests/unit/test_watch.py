"""The live view: sparklines and durations by hand, one screen of a run at every stage."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from rlsc_mcore.commands.watch import render, run_watch, sparkline
from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.progress import seconds_left
from tests.helpers.run_folders import make_metrics, write_run


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([1, 1], 8, "▁▁"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([], 5, ""),
        ([float("nan"), 2.0, 1.0], 5, "█▁"),
    ],
)
def test_sparklines(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_what_is_left_follows_the_last_steps() -> None:
    rows = [
        make_metrics(step, seconds={"rollout": 100.0 if step < 3 else 2.0, "train": 1.0}) for step in range(8)
    ]
    assert (
        seconds_left(rows, 10) == pytest.approx(2 * 3.0)
        and seconds_left([], 10) is None
        and seconds_left(rows, 8) == 0
    )


def text_of(rows: list[dict[str, object]], status: dict[str, object]) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(render("mine", rows, status, 20, width=100, now=1000.0))
    return console.export_text()


def test_a_screen_of_a_running_run() -> None:
    rows = [make_metrics(step, warnings=[f"warning {step}"]) for step in range(8)]
    text = text_of(rows, {"state": "running", "phase": "rollout", "phase_since": 988.0, "tokens": 12345})
    assert (
        "mine  step 8/20" in text
        and "rollout for 12 s, 12,345 tokens" in text
        and "about 54 s of steps left" in text
    )
    assert "step 8: warning 7" in text and "warning 2" not in text and "and 3 earlier warnings" in text
    (loss,) = [line for line in text.splitlines() if "loss" in line]
    assert loss.split()[1:] == ["loss", "0.4", "█▇▆▅▄▃▂▁", "0.33", "│"]


def test_a_screen_before_the_first_step_and_after_the_last() -> None:
    assert "no step has ended yet" in text_of([], {})
    assert "left" not in text_of(
        [make_metrics(step) for step in range(20)], {"state": "done", "phase": "evaluation"}
    )


def test_watching_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", metrics=[make_metrics(0)])
    (run / "status.json").write_text(json.dumps({"state": "stopped"}), encoding="utf-8")
    assert run_watch([str(run)]) == 0  # no terminal: one screen
    assert "step 1/20" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no run there"):
        run_watch([str(tmp_path)])
    with pytest.raises(ConfigError, match="--every"):
        run_watch([str(run), "--every", "0"])
