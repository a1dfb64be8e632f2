"""Intervals and tests: exact small cases, coverage and false alarms by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.evaluation.statistics import (
    bootstrap_interval,
    crossed_change,
    holm,
    paired_change,
    sign_flip_p_value,
    t_distribution,
    t_quantile,
)


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize(("n", "p"), [*((30, i / 30) for i in range(1, 30)), (480, 0.996), (480, 0.5)])
def test_intervals_of_single_answers_cover_the_truth(n: int, p: float) -> None:
    """Exact coverage: the sum over every possible number of right answers."""
    intervals = [bootstrap_interval([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)]
    coverage = sum(
        chance for chance, (low, high) in zip(binomial(n, p), intervals, strict=True) if low <= p <= high
    )
    assert 0.91 < coverage < 0.98


@pytest.mark.parametrize("n", [30, 480])
@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize(
    "concentration", [None, 0.5, 5.0]
)  # None: all questions equally hard; 0.5: most always or never right
def test_intervals_of_means_of_k_answers_cover_the_truth(n: int, k: int, concentration: float | None) -> None:
    generator = np.random.default_rng(n + k)
    for p in (1 / 30, 0.5, 29 / 30):
        covered = 0
        for _ in range(250):
            rates = (
                np.full(n, p)
                if concentration is None
                else generator.beta(p * concentration, (1 - p) * concentration, n)
            )
            low, high = bootstrap_interval((generator.binomial(k, rates) / k).tolist())
            covered += low <= p <= high
        assert 0.9 < covered / 250 < 1.0


def test_no_interval_has_zero_width() -> None:
    # Wilson's own numbers for 0, 1, 29 and 30 of 30.
    for right, expected in (
        (0, (0.0, 0.1135)),
        (1, (0.0059, 0.1667)),
        (29, (0.8333, 0.9941)),
        (30, (0.8865, 1.0)),
    ):
        assert bootstrap_interval([1.0] * right + [0.0] * (30 - right)) == pytest.approx(expected, abs=1e-4)
    for values in ([0.5] * 4, [0.0] * 2, [1.0] * 2, [0.25, 0.25, 0.5]):
        low, high = bootstrap_interval(values)
        assert 0 <= low < sum(values) / len(values) + 1e-9 and high - low > 0.1
    change = paired_change(dict.fromkeys(range(30), 1.0), dict.fromkeys(range(30), 1.0))
    assert (change.mean, change.p_value) == (0.0, 1.0)
    assert (change.low, change.high) == pytest.approx(
        (-0.1135, 0.1135), abs=1e-4
    )  # Tango's score interval of 0 of 30


@pytest.mark.parametrize(("n", "k"), [(30, 1), (30, 8), (480, 1)])
@pytest.mark.parametrize(("first", "second"), [(0.03, 0.03), (0.03, 0.1), (0.5, 0.6), (0.97, 0.99)])
def test_intervals_of_paired_differences_cover_the_truth(n: int, k: int, first: float, second: float) -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(250):
        ranks = generator.random(
            (n, k)
        )  # one question is hard before and after: the two sides are correlated
        mixed = np.where(generator.random((n, k)) < 0.5, ranks, generator.random((n, k)))
        before, after = (ranks < first).mean(axis=1), (mixed < second).mean(axis=1)
        change = paired_change(dict(enumerate(before)), dict(enumerate(after)))
        covered += change.low <= second - first <= change.high
    assert covered / 250 > 0.9


def test_lengths_have_a_bootstrap_interval() -> None:
    assert bootstrap_interval([3.0] * 10) == pytest.approx((3.0, 3.0))


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (479, 1.96493)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: float, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert t_distribution(-t_quantile(0.975, freedom), freedom) == pytest.approx(0.025)


def test_seeds_are_a_level_of_their_own() -> None:
    """Between seeds of 0.1 spread: an interval over questions alone misses the truth, one over both does
    not."""
    generator = np.random.default_rng(6)
    alone = crossed = 0
    for _ in range(200):
        questions, seeds = generator.normal(0, 0.2, 100), generator.normal(0, 0.1, 3)
        after = [dict(enumerate(0.1 + questions + seed + generator.normal(0, 0.1, 100))) for seed in seeds]
        before = [dict.fromkeys(range(100), 0.0)] * 3
        found = crossed_change(before, after)
        assert found is not None and (found.num_questions, found.num_seeds) == (100, 3)
        crossed += found.low <= 0.1 <= found.high
        mean = {q: sum(part[q] for part in after) / 3 for q in range(100)}
        change = paired_change(before[0], mean)
        assert found.mean == pytest.approx(change.mean)
        alone += change.low <= 0.1 <= change.high
    assert 0.91 < crossed / 200 <= 0.99 and alone / 200 < 0.7


def test_without_spread_over_seeds_the_questions_decide() -> None:
    generator = np.random.default_rng(7)
    values = generator.normal(0.1, 0.3, 200)
    after = [dict(enumerate(values))] * 3
    found = crossed_change([dict.fromkeys(range(200), 0.0)] * 3, after)
    assert found is not None and found.seed_share < 1e-12
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(200))
    assert crossed_change([{0: 1.0, 1: 2.0}], [{0: 1.0, 1: 2.0}]) is None
    with pytest.raises(ValueError, match="2 before, 1 after"):
        crossed_change([{0: 1.0}, {0: 1.0}], [{0: 1.0}])


def test_holms_correction() -> None:
    # Holm's own example: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}) and list(found) == [
        "a",
        "b",
        "c",
        "d",
    ]
    assert holm({}) == {} and holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_one_question_bounds_nothing() -> None:
    assert bootstrap_interval([0.3]) == (-math.inf, math.inf)


def test_interval_agrees_with_the_normal_one_on_many_questions() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, size=800)
    error = values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_interval(values.tolist())
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_intervals_cover_the_truth_in_simulation() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for experiment in range(300):
        rates = generator.beta(1.0, 1.0, size=60)
        low, high = bootstrap_interval((generator.binomial(8, rates) / 8).tolist(), seed=experiment)
        covered += low <= 0.5 <= high
    assert 0.91 < covered / 300 < 0.985  # 0.95 +- 3 standard errors


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_small_tests_are_exact(changes: list[int]) -> None:
    observed = abs(sum(changes))
    patterns = list(itertools.product((-1, 1), repeat=len(changes)))
    expected = sum(
        abs(sum(sign * change for sign, change in zip(signs, changes, strict=True))) >= observed
        for signs in patterns
    )
    assert sign_flip_p_value(np.array(changes, dtype=float)) == pytest.approx(expected / len(patterns))


def test_random_signs_agree_with_the_binomial() -> None:
    # 40 changes of one size: the exact p-value is a binomial tail.
    changes = np.array([1.0] * 27 + [-1.0] * 13)
    exact = 2 * sum(math.comb(40, k) for k in range(27, 41)) / 2**40
    assert sign_flip_p_value(changes) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_false_alarms_are_as_rare_as_promised() -> None:
    generator = np.random.default_rng(2)
    p_values = [sign_flip_p_value(generator.normal(size=30), seed) for seed in range(300)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_paired_change_uses_shared_questions_only() -> None:
    change = paired_change({0: 0.1, 1: 0.2, 2: 0.9}, {1: 0.5, 2: 0.9, 3: 1.0})
    assert (change.mean, change.num_questions) == (pytest.approx(0.15), 2)
    assert change.low <= change.mean <= change.high and change.p_value == 1.0  # one change has two signs
    with pytest.raises(ValueError, match="both sides"):
        paired_change({0: 1.0}, {1: 1.0})
