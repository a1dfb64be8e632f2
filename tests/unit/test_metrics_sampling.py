"""pass@k, maj@k and calibration against enumeration and closed forms."""

import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.evaluation.sampling_scores import (
    auroc,
    majority_accuracy,
    majority_at_k,
    pass_at_k,
    reliability,
    sampling_scores,
)
from rlsc_mcore.evaluation.table import print_comparison
from tests.helpers.run_folders import make_answer


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(count: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, count)), data.draw(st.integers(1, count))
    subsets = list(itertools.combinations([True] * right + [False] * (count - right), k))
    assert pass_at_k(count, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased() -> None:
    generator, p, count, k = np.random.default_rng(0), 0.2, 10, 4
    values = [pass_at_k(count, int(right), k) for right in generator.binomial(count, p, size=20_000)]
    assert np.mean(values) == pytest.approx(1 - (1 - p) ** k, abs=4 * np.std(values) / math.sqrt(len(values)))


@pytest.mark.parametrize(("count", "right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_impossible_counts_are_refused(count: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(count, right, k)


def vote(extracted: str | None, sample: int = 0) -> AnswerRecord:
    answer = make_answer(0, str(extracted), right=extracted == "8", sample=sample)
    return replace(answer, extracted=extracted, boxed=extracted is not None)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["8", "8", "7"], 1.0),
        (["8", "7", "7"], 0.0),
        (["8", "7"], 0.5),  # a tie is shared
        (["8", "7", "6"], pytest.approx(1 / 3)),
        (["16/2", "8.0", "7", "7", "8"], 1.0),
        ([None, None, "8"], 1.0),
        ([None, None], 0.0),
    ],
)
def test_majority(votes: list[str | None], expected: float) -> None:
    answers = [replace(vote(text), strict=text in ("8", "8.0", "16/2")) for text in votes]
    assert majority_accuracy(answers) == expected


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs(samples: list[tuple[int, bool]]) -> None:
    right, wrong = [v for v, is_right in samples if is_right], [v for v, is_right in samples if not is_right]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    found = auroc([float(v) for v, _ in samples], [is_right for _, is_right in samples])
    assert found == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_bins_partition_the_answers_in_order(samples: list[tuple[float, bool]]) -> None:
    bins = reliability([p for p, _ in samples], [right for _, right in samples])
    assert sum(part.count for part in bins) == len(samples) and len(bins) <= 10
    confidences = [part.confidence for part in bins]
    assert confidences == sorted(confidences)
    assert sum(part.accuracy * part.count for part in bins) == pytest.approx(
        sum(right for _, right in samples)
    )


def test_a_calibrated_model_is_found_calibrated() -> None:
    generator = np.random.default_rng(1)
    p = generator.uniform(size=20_000)
    for part in reliability(p.tolist(), (generator.uniform(size=20_000) < p).tolist()):
        assert part.accuracy == pytest.approx(part.confidence, abs=0.05)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_maj_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    answers = [
        replace(make_answer(0, text, right=text == "a", sample=i), extracted=text)
        for i, text in enumerate("aabbc")
    ]
    expected = []
    for subset in itertools.combinations("aabbc", k):
        top = max(map(subset.count, subset))
        winners = {letter for letter in subset if subset.count(letter) == top}
        expected.append(("a" in winners) / len(winners))
    assert majority_at_k(answers, k) == pytest.approx(sum(expected) / len(expected))


def test_maj_at_k_of_many_answers_is_sampled_and_the_same_every_time() -> None:
    texts = ["a" if i % 3 else f"b{i}" for i in range(64)]
    answers = [
        replace(make_answer(0, text, right=text == "a", sample=i), extracted=text)
        for i, text in enumerate(texts)
    ]
    assert majority_at_k(answers, 1) == pytest.approx(42 / 64)
    assert majority_at_k(answers, 8) == majority_at_k(answers, 8) > 0.9 and majority_at_k(answers, 64) == 1


def test_all_scores_of_a_temperature() -> None:
    answers = [
        replace(
            make_answer(q, f"{q}{s}", right=s < right, sample=s),
            log_prob=-1.0 if s < right else -2.0,
            tokens=10 + s,
        )
        for q, right in ((0, 1), (1, 4), (2, 0))
        for s in range(4)
    ]
    scores = sampling_scores(answers, 1.0)
    assert {name for name in scores if "@" in name} == {
        "avg@4",
        *(f"pass@{k}" for k in (1, 2, 4)),
        *(f"maj@{k}" for k in (1, 2, 3, 4)),
    }
    assert scores["avg@4"]["mean"] == scores["maj@1"]["mean"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert scores["pass@1"]["mean"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert scores["pass@2"]["mean"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["pass@4"]["mean"] == pytest.approx(2 / 3)
    assert scores["maj@4"]["mean"] == pytest.approx(1 / 3)  # question 0: three wrong ones agree
    assert scores["median_length"]["mean"] == 11.5
    assert scores["mean_log_prob"]["mean"] == pytest.approx((-1.75 - 1 - 2) / 3)
    assert scores["calibration"]["auroc"] == scores["calibration"]["auroc_within"] == 1.0
    assert sampling_scores(answers, 0.5) == {}


def test_shares_are_labelled_by_the_temperature_they_come_from() -> None:
    value = {"mean": 0.5, "standard_error": None}
    for names, expected in (
        (("accuracy_t0.5", "accuracy_t1"), "boxed, T = 1"),
        (("accuracy_t0.5",), "boxed, T = 0.5"),
    ):
        console = Console(width=120, file=io.StringIO())
        print_comparison({"before": dict.fromkeys((*names, "boxed_share"), value)}, console)
        assert f"answers that are {expected} " in console.file.getvalue()  # type: ignore[attr-defined]
