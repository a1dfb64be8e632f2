"""The table of a step's metrics: every field is described, and console, watch and report show what it
says."""

import json
from dataclasses import MISSING, fields
from typing import Any

from rlsc_mcore.commands.watch import CURVES as WATCHED
from rlsc_mcore.observability.step_metrics import (
    DESCRIPTIONS,
    StepMetrics,
    console_line,
    numbers,
    read_number,
)
from rlsc_mcore.reports.curves import CURVES, curve_band, curve_points


def make_metrics(**changed: Any) -> StepMetrics:
    values: dict[str, Any] = {entry.name: 0.5 for entry in fields(StepMetrics)}
    values |= {
        "step": 3,
        "log_p_old": {"q10": -3.0, "q50": -2.0, "q90": -1.0},
        "seconds": {"rollout": 1.5, "train": 2.0},
    }
    values |= {
        "skipped": False,
        "warnings": [],
        "updates": None,
        "gpu": None,
        "packing": {},
        "memory": {},
        "memory_bytes": {},
    }
    return StepMetrics(**values | changed)


def test_every_field_is_described_and_required() -> None:
    assert list(DESCRIPTIONS) == [entry.name for entry in fields(StepMetrics)]
    for entry in fields(StepMetrics):
        description = DESCRIPTIONS[entry.name]
        assert description.label and description.help.endswith("."), entry.name
        assert entry.default is MISSING, "a step that leaves a field out must fail"
    assert len({description.label for description in DESCRIPTIONS.values()}) == len(DESCRIPTIONS)


def test_a_row_is_json_and_leaves_out_what_is_absent() -> None:
    row = json.loads(json.dumps(make_metrics().row()))
    assert "updates" not in row and "gpu" not in row and row["step"] == 3
    assert make_metrics(gpu={"energy_j_per_token": 2.0}).row()["gpu"] == {"energy_j_per_token": 2.0}
    assert make_metrics(log_prob_gap_mean=None).row()["log_prob_gap_mean"] is None


def test_numbers_are_flat_and_hold_no_switch() -> None:
    found = dict(numbers(make_metrics().row()))
    assert found["seconds/rollout"] == 1.5 and found["loss"] == 0.5
    assert "skipped" not in found and "step" not in found


def test_each_view_shows_its_fields() -> None:
    rows = [make_metrics().row()]
    assert console_line(rows[0]) == "loss 0.5000  F 0.5000  length 0.5  distinct 50%  boxed 50%  grad 0.500"
    assert set(WATCHED) == {name for name, description in DESCRIPTIONS.items() if description.watch}
    for name, curve in CURVES.items():
        ((steps_done, value),) = curve_points(rows, name, curve.path)
        assert steps_done == 4 and value is not None, name
    assert curve_band(rows, "log_p_old", CURVES["log_p_old"]) == [(4, -3.0, -1.0)]
    assert (
        curve_points([{"step": 0}], "loss") == [(1, None)]
        and curve_band([{"step": 0}], "log_p_old", CURVES["log_p_old"]) == []
    )
    assert read_number({"a": {"b": True}}, "a", "b") is None
