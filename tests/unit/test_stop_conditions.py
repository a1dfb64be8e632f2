"""Conditions that end a run without labels, and the statistics of answers that they read."""

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.observability.agreement import question_row, read_answer, summarise
from rlsc_mcore.training.stop_rules import StopCondition, met_condition

REQUIRED = ["--run-dir", "run", "--model.path", "model", "--data.path", "data"]


def config(*conditions, after=2):
    flags = ["--training.stop-after", str(after)]
    return parse_config([*REQUIRED, *flags, "--training.stop-on", *conditions])


def rows(*lengths):
    return [{"step": i, "mean_length": length, "seconds": {"train": 1.0}} for i, length in enumerate(lengths)]


def test_a_condition_must_hold_in_consecutive_steps():
    limits = config("mean_length<0.5x")
    assert met_condition(rows(10, 4), limits) is None
    assert met_condition(rows(10, 4, 6, 4), limits) is None
    assert met_condition(rows(10, 6, 4.9, 4), limits) == "mean_length<0.5x"
    assert met_condition(rows(10, 6, 5, 4), limits) is None, "exactly half is not below half"


def test_absolute_upper_and_nested_values():
    assert met_condition(rows(9, 11, 12), config("mean_length > 10")) == "mean_length > 10"
    assert met_condition(rows(1, 1), config("loss>3", "seconds/train>0.5")) == "seconds/train>0.5"
    assert met_condition(rows(1, 1), config("loss<3")) is None, "a missing number meets no condition"
    assert met_condition(rows(1, 1), parse_config(REQUIRED)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_length", "expected METRIC<VALUE or METRIC>VALUE"),
        ("mean_length<", "expected METRIC<VALUE or METRIC>VALUE"),
        ("mean_length<1e", "expected METRIC<VALUE or METRIC>VALUE"),
        ("mean_lenght<0.5x", "no metric mean_lenght in metrics.jsonl"),
    ],
)
def test_a_wrong_condition_is_named(text, message):
    with pytest.raises(ConfigError, match=r"training\.stop_on: ") as error:
        StopCondition.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_answers_are_read_from_box_statement_or_last_number():
    assert read_answer("so \\boxed{04}") == read_answer("The answer is 4.") == read_answer("2 + 2 = 4") == "4"
    assert read_answer("no idea") is None


def test_agreement_by_hand():
    questions = [["4", "4", "5", None], ["4", "4", "4", "4"], ["7", "8", None, None], [None] * 4]
    found = summarise([question_row(keys) for keys in questions])
    assert found.agreement == pytest.approx((2 / 4 + 4 / 4 + 1 / 4 + 0) / 4)
    assert found.answered_share == pytest.approx(9 / 16)
    assert found.distinct_answers == pytest.approx((2 / 4 + 1 / 4 + 2 / 4 + 0) / 4)
    assert found.same_answer_share == pytest.approx(2 / 4), "4 is the most frequent answer of two questions"


def test_no_rows_and_no_answers():
    assert summarise([]) == (0.0, 0.0, 0.0, 0.0)
    assert summarise([question_row([None, None])]) == (0.0, 0.0, 0.0, 0.0)
