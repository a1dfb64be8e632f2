"""Sections of the report that need counting: alarms in a row, and whether confident answers are right more
often."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.commands.report import run_report
from rlsc_mcore.experiments.compare import within_shares
from rlsc_mcore.reports.axes import short_number
from rlsc_mcore.reports.contents import RunView
from rlsc_mcore.reports.curves import calibration_panels
from rlsc_mcore.reports.read import read_run
from tests.helpers.run_folders import make_answer, make_metrics, write_run


def view(warnings: dict[int, list[str]]) -> RunView:
    rows: list[dict[str, Any]] = [make_metrics(step, warnings=warnings.get(step, [])) for step in range(12)]
    return RunView("run", "runs/run", (), rows, (), 0, (), ())


def test_alarms_in_a_row_are_one() -> None:
    run = view(
        {
            1: ["diversity loss: 9%"],
            2: ["diversity loss: 8%", "cut"],
            3: ["diversity loss: 7%"],
            7: ["diversity loss: 6%"],
            8: ["cut"],
        }
    )
    assert run.alarm_spans == [
        (2, 4, "diversity loss: 7%"),
        (3, 3, "cut"),
        (8, 8, "diversity loss: 6%"),
        (9, 9, "cut"),
    ]
    assert len(run.alarms) == 6 and view({}).alarm_spans == []


def test_alarms_in_a_row_are_written_once(tmp_path: Path) -> None:
    rows = [
        make_metrics(step, warnings=["length collapse: <i>3</i>"] if step in (2, 3) else [])
        for step in range(5)
    ]
    run = write_run(tmp_path / "run", before=[], after=[], questions=[], metrics=rows)
    assert run_report([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("length collapse") == 1
        and "steps 3 to 4, at the last: length collapse: &lt;i&gt;3&lt;/i&gt;" in page
    )


def test_calibration_follows_the_answers(tmp_path: Path) -> None:
    # Ten answers of ten confidences; the five most confident are right. Greedy ones have no probability and
    # do not count.
    before = [
        replace(make_answer(0, "a", right=s >= 5, sample=s), log_prob=-5.0 + 0.5 * s) for s in range(10)
    ]
    after = [replace(answer, log_prob=None) for answer in before]
    greedy = [make_answer(0, "g", right=False, temperature=0.0)]
    run = read_run(
        write_run(
            tmp_path / "run",
            before=before + greedy,
            after=after + greedy,
            questions=[],
            metrics=[make_metrics(0)],
        )
    )
    (found,) = run.calibrations
    assert (found.side, found.temperature, found.auroc, found.auroc_within) == ("before", 1.0, 1.0, 1.0)
    assert [x for x, _, _ in found.curve] == pytest.approx([5 + 10 * i for i in range(10)])
    assert [right for _, _, right in found.curve] == [0.0] * 5 + [1.0] * 5
    assert found.curve[0][1] == pytest.approx(2.718281828459045**-5)
    (panel,) = calibration_panels([run])
    assert "AUROC: 1.00 before (1.00 among answers to one question)" in panel.help and len(panel.legend) == 2
    assert calibration_panels([view({})]) == []
    nothing_right = replace(run, calibrations=[replace(found, auroc=None, auroc_within=None)])
    assert "none before (all right or all wrong)" in calibration_panels([nothing_right])[0].help


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(5.25e-4, 2.5e-5, "0.000525"), (1e-3, 2.5e-4, "0.001"), (0.5, 0.25, "0.50"), (0.0, 1e-5, "0")],
)
def test_small_ticks_are_short(value: float, step: float, text: str) -> None:
    assert short_number(value, step) == text


def test_intervals_of_shares_stay_within_them() -> None:
    assert within_shares({"low": -0.1, "high": 1.2}) == (0.0, 1.0) and within_shares(
        {"low": 0.2, "high": 0.3}
    ) == (0.2, 0.3)
