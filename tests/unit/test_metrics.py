"""metrics.jsonl: appended, cut where a run resumes, read past a half-written end; and what raises an
alarm."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.observability.metrics import MetricsWriter, alarms, read_metrics, signal_warnings
from rlsc_mcore.run.files import row_from_json, row_to_json
from rlsc_mcore.run.folder import METRICS_FILE
from rlsc_mcore.run.progress import last_metrics


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 0.5 - step, "seconds": {"train": 1.5}, "warnings": [], "skipped": False}
        for step in range(count)
    ]


def write(
    folder: Path, entries: list[dict[str, Any]], *, first_step: int = 0, tensorboard: bool = False
) -> MetricsWriter:
    writer = MetricsWriter(folder, first_step=first_step, enabled=True, tensorboard=tensorboard)
    for row in entries:
        writer.write(row)
    writer.close()
    return writer


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path, rows(3))
    assert read_metrics(tmp_path) == rows(3)
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    ] == [0, 1, 2]


def test_no_file_is_no_row(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    write(tmp_path, rows(3))
    file = tmp_path / METRICS_FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert read_metrics(tmp_path) == rows(3 if cut == 1 else 2)
    writer = write(tmp_path, rows(4)[3:], first_step=2)
    assert (
        [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 3] == [row["step"] for row in writer.rows]
    )


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
        (step, name): pytest.approx(value)
        for step in range(2)
        for name, value in (("loss", 0.5 - step), ("seconds/train", 1.5))
    }


BROKEN = [
    {
        "step": 0,
        "loss": math.nan,
        "log_prob_gap_mean": None,
        "log_p_old": {"q50": -math.inf},
        "updates": [{"loss": 1.0}, {"loss": math.inf}],
    },
    {"step": 1, "loss": 2.0, "seconds": {}, "warnings": ["NaN"]},
]


def test_every_line_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    writer = write(tmp_path, BROKEN)
    MetricsWriter(
        tmp_path, first_step=2, enabled=True, tensorboard=False
    ).close()  # the rows are written again
    rows = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    ]
    assert (
        rows[0]["loss"] is None
        and rows[0]["log_p_old"] == {"q50": None}
        and rows[0]["updates"] == [{"loss": 1.0}, {"loss": None}]
    )
    assert rows[0]["not_finite"] == {"loss": "nan", "log_p_old/q50": "-inf", "updates/1/loss": "inf"}
    assert rows[1] == BROKEN[1]
    # Read back they are what they were: a gap that is no number counts as a mismatch, one that was not
    # compared does not.
    for found in (read_metrics(tmp_path), writer.rows, last_metrics(tmp_path)):
        assert (
            math.isnan(found[0]["loss"])
            and found[0]["log_prob_gap_mean"] is None
            and "not_finite" not in found[0]
        )
        assert found[0]["log_p_old"]["q50"] == -math.inf and found[0]["updates"][1]["loss"] == math.inf


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["nan", "NaN", "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "loss", "x.y", "nan", "0"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(["a", "loss", "x.y", "nan", "0"]), json_values, max_size=4))
def test_a_row_comes_back_as_it_was(row: dict[str, Any]) -> None:
    line = row_to_json(row)
    json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert repr(row_from_json(line)) == repr(row)


@pytest.mark.parametrize("first_step", [0, 2])
def test_tensorboard_shows_a_repeated_step_once(tmp_path: Path, first_step: int) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, rows(4), tensorboard=True)
    repeated = [{"step": step, "loss": 100.0 + step} for step in range(first_step, 5)]
    write(tmp_path, repeated, first_step=first_step, tensorboard=True)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(tmp_path)]
    assert [step for step, _ in shown] == [0, 1, 2, 3, 4]


def test_the_advice_for_cut_answers_fits_the_cause() -> None:
    (raise_it,) = alarms(FIRST | {"truncated_share": 1.0}, FIRST)
    (no_end,) = alarms(FIRST | {"truncated_share": 1.0}, FIRST, ends=False)
    assert raise_it.endswith("raise it") and "eos_token_id" in no_end and "raise it" not in no_end


FIRST = {"mean_length": 100.0, "f_estimate": 0.1, "distinct_share": 0.8, "truncated_share": 0.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"mean_length": 50.0}, None),
        ({"mean_length": 49.0}, "length collapse: answers average 49.0 tokens, 100.0 at the first step"),
        ({"f_estimate": 0.3}, None),
        ({"f_estimate": None, "distinct_share": 0.1}, None),
        ({"distinct_share": 0.1}, None),
        (
            {"f_estimate": 0.3, "distinct_share": 0.39},
            "diversity loss: F rose from 0.1 to 0.3 while distinct answers fell from 80% to 39%",
        ),
        ({"truncated_share": 0.9}, None),
        ({"truncated_share": 0.95}, "95% of the answers were cut at rollout.max_new_tokens"),
    ],
)
def test_alarms(change: dict[str, float | None], named: str | None) -> None:
    found = alarms(FIRST | change, FIRST)
    assert len(found) == (named is not None)
    assert named is None or found[0].startswith(named)


@pytest.mark.parametrize(
    ("row", "reads_boxes", "has_advantages", "named"),
    [
        ({"effective_samples": 3.0, "boxed_share": 0.0}, True, True, None),
        ({"effective_samples": 0.0, "boxed_share": 0.0}, True, True, "algorithm.rewards"),
        ({"effective_samples": 0.0, "boxed_share": 0.0}, False, True, "rollout.temperature"),
        ({"effective_samples": 0.0, "boxed_share": 0.9}, True, True, "rollout.temperature"),
        (
            {"effective_samples": 0.0, "boxed_share": 0.0},
            True,
            False,
            "algorithm.rewards",
        ),  # scpo, self_distill
        ({"effective_samples": 0.0, "boxed_share": 0.9}, True, False, None),
        ({"effective_samples": 5.0, "boxed_share": 0.0}, False, False, None),  # rlsc
    ],
)
def test_a_step_that_teaches_nothing_says_why(
    row: dict[str, float], reads_boxes: bool, has_advantages: bool, named: str | None
) -> None:
    found = signal_warnings(row, reads_boxes=reads_boxes, has_advantages=has_advantages)
    assert (len(found) == 1 and named in found[0]) if named else found == []
