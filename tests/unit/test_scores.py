"""Scores: values and standard errors against closed forms and textbook sums, coverage of their intervals by
simulation."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.evaluation.over_seeds import metric_names
from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.evaluation.scores import (
    estimate,
    key_temperature,
    question_scores,
    score,
    score_key,
    score_label,
)


def outcome(
    strict: bool = False,
    *,
    num_tokens: int = 10,
    response: str = "a",
    log_prob: float | None = -1.0,
    **flags: bool,
) -> AnswerRecord:
    return AnswerRecord(
        question=0,
        temperature=1.0,
        sample=0,
        gold="",
        text=response,
        extracted=None,
        strict=strict,
        lenient=flags.get("lenient", strict),
        boxed=flags.get("boxed", strict),
        truncated=flags.get("truncated", False),
        tokens=num_tokens,
        log_prob=log_prob,
    )


# Two questions of two samples and one of four, every number below worked out by hand.
QUESTIONS = [
    [
        outcome(True, num_tokens=4, response="x", log_prob=math.log(0.5)),
        outcome(True, num_tokens=4, response="x", log_prob=math.log(0.5)),
    ],
    [
        outcome(False, lenient=True, num_tokens=6, response="y", log_prob=math.log(0.2)),
        outcome(False, truncated=True, num_tokens=10, response="z", log_prob=math.log(0.1)),
    ],
    [
        outcome(True, num_tokens=1, response="p", log_prob=math.log(0.4)),
        outcome(False, boxed=True, num_tokens=2, response="q", log_prob=math.log(0.2)),
        outcome(False, boxed=True, num_tokens=3, response="q", log_prob=math.log(0.2)),
        outcome(False, boxed=True, num_tokens=2, response="r", log_prob=-5000.0),
    ],
]


def test_every_score_by_hand() -> None:
    scores = score(QUESTIONS)
    question_means = {
        "accuracy": [1, 0, 0.25],
        "lenient": [1, 0.5, 0.25],
        "boxed_share": [1, 0, 1],
        "mean_length": [4, 8, 2],
        "truncated_share": [0, 0.5, 0],
        "distinct_share": [0.5, 1, 0.75],
        "confidence_f": [
            0.5,
            0.15,
            0.2,
        ],  # the last answer's probability underflows to nothing, not to an error
    }
    assert list(scores) == list(question_means)
    for name, means in question_means.items():
        assert scores[name]["mean"] == pytest.approx(statistics.mean(means), rel=1e-12), name
        assert scores[name]["standard_error"] == pytest.approx(
            statistics.stdev(means) / math.sqrt(3), rel=1e-12
        ), name


def test_bernoulli_closed_form() -> None:
    # One sample per question: the standard error is sqrt(p (1 - p) / (n - 1)).
    right, count = 30, 120
    scores = score([[outcome(index < right)] for index in range(count)])
    assert scores["accuracy"]["mean"] == pytest.approx(0.25)
    assert scores["accuracy"]["standard_error"] == pytest.approx(
        math.sqrt(0.25 * 0.75 / (count - 1)), rel=1e-12
    )


def test_more_samples_of_the_same_outcomes_do_not_shrink_the_error() -> None:
    once = score([[outcome(index % 3 == 0)] for index in range(30)])
    often = score([[outcome(index % 3 == 0)] * 16 for index in range(30)])
    assert often["accuracy"] == once["accuracy"]
    assert often["confidence_f"]["standard_error"] == pytest.approx(0, abs=1e-15)


def test_confidence_is_absent_where_a_log_prob_is() -> None:
    questions = [QUESTIONS[0], [outcome(log_prob=None)]]
    assert "confidence_f" not in score(questions) and "accuracy" in score(questions)


def test_one_question_has_no_standard_error() -> None:
    assert score(QUESTIONS[:1])["accuracy"] == {"mean": 1.0, "standard_error": None}


@pytest.mark.parametrize(
    "temperatures", [(0.2, 0.25), (0.55, 0.6), (0.1234567, 0.1234568), (1.0, 1.05, 0.05)]
)
def test_different_temperatures_have_different_keys(temperatures: tuple[float, ...]) -> None:
    keys = [
        score_key(kind, temperature)
        for kind in ("accuracy", "lenient")
        for temperature in (0.0, *temperatures)
    ]
    assert len(set(keys)) == len(keys)
    assert [key_temperature(key) for key in keys] == [None, *temperatures] * 2
    assert set(metric_names(temperatures)) >= set(keys)


def test_labels() -> None:
    assert score_label("accuracy_t0.5") == "accuracy, T = 0.5 (boxed)"
    assert score_label("lenient_t1") == "accuracy, T = 1 (last number)"
    assert score_label("boxed_share", 0.7) == "answers that are boxed, T = 0.7"
    assert score_label("greedy", 0.7) == "accuracy, greedy (boxed)" and score_label("other") == "other"


@pytest.mark.parametrize("questions", [[], [[]], [[outcome()], []]])
def test_nothing_to_score_is_an_error(questions: list[list[AnswerRecord]]) -> None:
    with pytest.raises(ValueError, match=r"at least one (question|sample)"):
        score(questions)


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
def test_order_of_questions_and_samples_changes_nothing(flags: list[list[bool]], random: object) -> None:
    questions = [[outcome(flag, response=str(flag)) for flag in samples] for samples in flags]
    shuffled = [list(reversed(samples)) for samples in reversed(questions)]
    first, second = score(questions), score(shuffled)
    for name in first:
        assert first[name]["mean"] == pytest.approx(second[name]["mean"])
        assert first[name]["standard_error"] == pytest.approx(second[name]["standard_error"])


def test_intervals_cover_the_truth_and_would_not_without_clustering() -> None:
    # Questions differ in difficulty (Beta(0.5, 0.5), mean 1/2) and 16 samples share it: 95 % intervals over
    # 2000 experiments.
    generator = np.random.default_rng(0)
    num_experiments, num_questions, num_samples = 2000, 60, 16
    difficulty = generator.beta(0.5, 0.5, size=(num_experiments, num_questions))
    counts = generator.binomial(num_samples, difficulty)
    covered = covered_as_if_independent = 0
    for row in counts:
        value = estimate((row / num_samples).tolist())
        covered += abs(value["mean"] - 0.5) < 1.96 * (value["standard_error"] or 0)
        pooled = row.sum() / (num_questions * num_samples)
        covered_as_if_independent += abs(pooled - 0.5) < 1.96 * math.sqrt(
            pooled * (1 - pooled) / (num_questions * num_samples)
        )
    assert 0.93 < covered / num_experiments < 0.965
    assert covered_as_if_independent / num_experiments < 0.7


def test_confidence_f_estimates_the_chance_that_two_samples_agree() -> None:
    # F = sum p^2 of a known distribution, from samples of it; the mean lands within 4 of its own standard
    # errors.
    generator = np.random.default_rng(1)
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    truth = float((probabilities**2).sum())
    questions = [
        [
            outcome(response=str(index), log_prob=float(np.log(probabilities[index])))
            for index in generator.choice(4, size=8, p=probabilities)
        ]
        for _ in range(400)
    ]
    value = score(questions)["confidence_f"]
    assert value["standard_error"] is not None and value["standard_error"] < 0.01
    assert abs(value["mean"] - truth) < 4 * value["standard_error"]
    assert (
        question_scores(questions[0])["distinct_share"] == len({sample.text for sample in questions[0]}) / 8
    )


def test_the_error_of_a_share_is_not_zero_where_all_questions_agree() -> None:
    """Half of Wilson's 95 % interval of 480 of 480, 0.99206 to 1, over 1.95996."""
    from rlsc_mcore.evaluation.scores import estimate

    assert estimate([1.0] * 480)["standard_error"] == pytest.approx(
        (1 - 1 / (1 + 3.8414588 / 480)) / 3.9199280, rel=1e-6
    )
    assert estimate([0.0] * 30)["standard_error"] == pytest.approx(estimate([1.0] * 30)["standard_error"])
    assert estimate([0.5] * 30)["standard_error"] == 0.0  # no share that a bound limits
