"""The judge of the quick start's summary: it passes a good one and names what is wrong with each bad one."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.check_quickstart import MEASURES, THREE_MODES, check, rise_in_standard_errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def summary() -> dict[str, Any]:
    def measures(mean: float) -> dict[str, Any]:
        return {name: {"mean": mean, "standard_error": 0.03} for name in MEASURES}

    good = {
        "before": measures(0.4),
        "after": measures(0.6),
        "seconds": {"install": 0.2, "train": 100.0, "total": 150.0},
        "engine_equals_export": True,
        "three_modes": {
            group: {"before": measures(0.5), "after": measures(0.5 + 0.4 * sign)}
            for group, sign in THREE_MODES.items()
        },
    }
    return copy.deepcopy(good)


def test_a_clear_rise_passes(summary: dict[str, Any]) -> None:
    assert check(summary) == []
    assert rise_in_standard_errors(summary, "greedy") == pytest.approx(0.2 / (0.03 * 2**0.5))


def test_exactly_three_standard_errors_are_not_enough(summary: dict[str, Any]) -> None:
    for name in ("accuracy_t0.5", "accuracy_t1"):
        summary["before"][name] = {"mean": 0.5, "standard_error": 0.0}
        summary["after"][name] = {"mean": 0.5 + 3 * 0.0625, "standard_error": 0.0625}
    assert "rose too little" in check(summary)[0]
    summary["after"]["accuracy_t1"]["mean"] += 0.001
    assert check(summary) == []


def test_a_rise_in_other_measures_does_not_count(summary: dict[str, Any]) -> None:
    for name in ("accuracy_t0.5", "accuracy_t1"):
        summary["after"][name] = dict(summary["before"][name])
    assert "rose too little" in check(summary)[0]


def test_every_author_of_the_second_table_must_change_as_expected(summary: dict[str, Any]) -> None:
    for group, sides in summary["three_modes"].items():
        changed = copy.deepcopy(summary)
        changed["three_modes"][group] = {"before": sides["after"], "after": sides["before"]}
        (problem,) = check(changed)
        assert problem.startswith(f"three_modes.{group}: accuracy at T = 0.5 must ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("three_modes"), "three_modes.rare right mode"),
        (lambda s: s["three_modes"]["wrong mode"].pop("after"), "three_modes.wrong mode"),
        (lambda s: s["after"].pop("lenient_t1"), "after.lenient_t1"),
        (lambda s: s["before"]["confidence_f"].update(mean=float("nan")), "before.confidence_f"),
        (lambda s: s["after"]["mean_length"].update(standard_error=None), "after.mean_length"),
        (lambda s: s.pop("before"), "before.accuracy_t0.5"),
        (lambda s: s["seconds"].pop("install"), "seconds.install"),
        (lambda s: s["seconds"].update(train=True), "seconds.train"),
        (lambda s: s.update(engine_equals_export="true"), "engine_equals_export"),
        (lambda s: s.pop("engine_equals_export"), "engine_equals_export"),
    ],
)
def test_what_is_missing_is_named(summary: dict[str, Any], change: Any, named: str) -> None:
    change(summary)
    assert any(problem.startswith(named) for problem in check(summary))


@pytest.mark.parametrize(("rise", "code"), [(0.2, 0), (0.01, 1)])
def test_as_a_command_its_exit_code_is_the_verdict(
    summary: dict[str, Any], tmp_path: Path, rise: float, code: int
) -> None:
    for measure in summary["after"].values():
        measure["mean"] = 0.4 + rise
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.check_quickstart", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
