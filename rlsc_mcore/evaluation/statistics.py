"""Compute intervals and tests for means over questions. The sampling units are questions and seeds.

- Fractions (accuracy and other values between 0 and 1): Wilson's interval with an effective number of
questions.
- Paired differences of fractions: the intervals of gains and losses combined (MOVER).
- Other means (lengths): bootstrap over questions.
- Paired differences: sign-flip test; several tests: Holm's correction.
- Several seeds: questions and seeds as crossed random levels, with a t quantile because there are few seeds.

Sources: E. B. Wilson 1927; N. Dean, M. Pagano 2015 (clustered proportions); G. Y. Zou, A. Donner 2008
(MOVER); C. Cameron, J. Gelbach, D. Miller 2011 (two-way clustering); S. Holm 1979.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 10_000
LARGEST_EXACT_TEST = 14  # most changed questions for which all 2^n sign patterns are enumerated
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class PairedChange:
    """The mean of after - before over the same questions, with its uncertainty."""

    mean: float
    standard_error: float | None  # None for one question alone
    low: float  # bounds of the confidence interval
    high: float
    p_value: float  # two-sided; null hypothesis: no change in any question
    num_questions: int


@dataclass(frozen=True)
class CrossedChange:
    """The mean of after - before over the same questions and seeds; both are random samples."""

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float  # two-sided; null hypothesis: a mean of 0 over questions and seeds
    seed_share: float  # fraction of the variance that comes from the seeds
    num_questions: int
    num_seeds: int


def wilson_interval(share: float, count: float, level: float = CONFIDENCE_LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction of `count` independent answers; `count` may be
    fractional."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, center - half) if share > 0 else 0.0, min(1.0, center + half) if share < 1 else 1.0


def share_interval(values: Sequence[float], level: float = CONFIDENCE_LEVEL) -> tuple[float, float]:
    """Return the interval of the mean of one fraction (0 to 1) per question; (-inf, inf) for one question.

    It is Wilson's interval with an effective count: the number of independent single answers with the same
    variance. With one answer per question, the effective count is the number of questions; with means of k
    answers, it is between that number and k times that number. If few questions differ from the nearer bound,
    the variance is a poor estimate, and the effective count is reduced towards the number of questions. The
    width is never zero. Raises ValueError if there are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    if count == 0:
        raise ValueError("an interval needs at least one question")
    if count == 1:
        return -math.inf, math.inf
    mean = min(1.0, max(0.0, float(data.mean())))
    return wilson_interval(mean, _effective_count(data, mean, level), level)


def bootstrap_interval(
    values: Sequence[float], level: float = CONFIDENCE_LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of one number per question.

    It is `share_interval` for fractions, else the percentile bootstrap, and (-inf, inf) for one question. The
    bootstrap means are widened by sqrt(n / (n - 1)), because the plain bootstrap underestimates the variance.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2 or _are_shares(data):
        return share_interval(values, level)
    return _percentile_interval(data, level, seed)


def difference_interval(differences: Sequence[float], level: float = CONFIDENCE_LEVEL) -> tuple[float, float]:
    """Return the interval of the mean of one difference of two fractions (-1 to 1) per question.

    The mean gain and the mean loss are fractions. Their intervals are combined using the correlation of gain
    and loss. The width is not zero even if no question changed.
    """
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2:
        return share_interval([0.0] * len(data), level)
    gains, losses = np.maximum(data, 0.0), np.maximum(-data, 0.0)
    gain, loss = float(gains.mean()), float(losses.mean())
    spread = float(gains.std() * losses.std())
    correlation = float(((gains - gain) * (losses - loss)).mean()) / spread if spread > 0 else 0.0
    (gain_low, gain_high), (loss_low, loss_high) = (
        share_interval(gains.tolist(), level),
        share_interval(losses.tolist(), level),
    )

    def combined(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second))

    mean = gain - loss
    below, above = combined(gain - gain_low, loss_high - loss), combined(gain_high - gain, loss - loss_low)
    return max(-1.0, mean - below), min(1.0, mean + above)


def paired_change(before: Mapping[int, float], after: Mapping[int, float], seed: int = 0) -> PairedChange:
    """Compare one number per question before and after, over the questions that both sides have.

    The interval is `difference_interval` if both sides are fractions, else the percentile bootstrap. The
    p-value is that of the sign-flip test: exact for up to 14 changed questions, else with 10,000 random sign
    patterns. Raises ValueError if the sides have no question in common.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise ValueError("a paired comparison needs questions that both sides answered")
    first, second = (
        np.array([side[question] for question in shared], dtype=np.float64) for side in (before, after)
    )
    differences = second - first
    count = len(differences)
    if count == 1:
        low, high = -math.inf, math.inf
    elif _are_shares(first) and _are_shares(second):
        low, high = difference_interval(differences.tolist())
    else:
        low, high = _percentile_interval(differences, CONFIDENCE_LEVEL, seed)
    return PairedChange(
        mean=float(differences.mean()),
        standard_error=float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
        low=low,
        high=high,
        p_value=sign_flip_p_value(differences, seed),
        num_questions=count,
    )


def crossed_change(
    before: Sequence[Mapping[int, float]],
    after: Sequence[Mapping[int, float]],
    level: float = CONFIDENCE_LEVEL,
) -> CrossedChange | None:
    """Compare before and after over questions and seeds; each side is one mapping question -> number per
    seed.

    Seeds are paired by position. Questions and seeds are crossed random levels: the variance of the mean is
    the variance over questions plus the variance over seeds minus their common part. The interval uses a t
    quantile with Satterthwaite's degrees of freedom, so few seeds give a wider interval. Returns None for
    fewer than two seeds or two shared questions. Raises ValueError if the numbers of seeds differ.
    """
    if len(before) != len(after):
        raise ValueError(f"a comparison over seeds needs pairs: {len(before)} before, {len(after)} after")
    shared = sorted(set.intersection(*(set(part) for part in [*before, *after]))) if before else []
    if len(before) < 2 or len(shared) < 2:
        return None
    table = np.array(
        [[second[q] - first[q] for q in shared] for first, second in zip(before, after, strict=True)]
    )
    num_seeds, num_questions = table.shape
    mean = float(table.mean())
    by_question = float(table.mean(axis=0).var(ddof=1)) / num_questions
    by_seed = float(table.mean(axis=1).var(ddof=1)) / num_seeds
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + mean
    both = float((rest**2).sum()) / ((num_seeds - 1) * (num_questions - 1)) / (num_seeds * num_questions)
    variance = max(by_question + by_seed - both, by_question, by_seed)
    error = math.sqrt(variance)
    if error == 0:
        return CrossedChange(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, num_questions, num_seeds)
    parts = by_question**2 / (num_questions - 1) + by_seed**2 / (num_seeds - 1)
    freedom = (
        max(1.0, min(variance**2 / parts, num_questions * num_seeds - 1.0))
        if parts > 0
        else float(num_questions - 1)
    )
    half = t_quantile((1 + level) / 2, freedom) * error
    p_value = min(1.0, 2 * (1 - t_distribution(abs(mean) / error, freedom)))
    seed_share = min(1.0, max(0.0, by_seed - both) / variance)
    return CrossedChange(mean, error, mean - half, mean + half, p_value, seed_share, num_questions, num_seeds)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for multiple tests by Holm's step-down method, which controls the family-wise error
    rate."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def t_distribution(value: float, freedom: float) -> float:
    """Return the probability that Student's t with `freedom` degrees (1 or more) is below `value`."""
    # Substitute x = sqrt(freedom) tan(angle): the density becomes a power of a cosine on a finite interval.
    angle = math.atan(abs(value) / math.sqrt(freedom))
    grid = np.linspace(0.0, angle, 401)
    heights = np.cos(grid) ** (freedom - 1)
    area = (
        float((heights[:-1] + 4 * np.cos((grid[:-1] + grid[1:]) / 2) ** (freedom - 1) + heights[1:]).sum())
        * (angle / 400)
        / 6
    )
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + math.copysign(area * scale, value)


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t with `freedom` degrees (1 or more) for a probability above 0.5."""
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def sign_flip_p_value(differences: npt.NDArray[np.float64], seed: int = 0) -> float:
    """Return the p-value of the sign-flip test.

    It is the probability of a mean at least this far from 0 if the sign of each change is random.
    """
    changed = differences[differences != 0]
    if not len(changed):
        return 1.0
    observed = abs(float(changed.sum())) * (1 - 1e-12)  # tolerance for another order of summation
    if len(changed) <= LARGEST_EXACT_TEST:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(changed))))
        return float((np.abs(signs @ changed) >= observed).mean())
    generator = np.random.default_rng(seed)
    hits = 0
    for size in _chunks(NUM_RESAMPLES, len(changed)):
        signs = generator.integers(0, 2, size=(size, len(changed)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ changed) >= observed).sum())
    return (hits + 1) / (NUM_RESAMPLES + 1)


def _are_shares(data: npt.NDArray[np.float64]) -> bool:
    return bool(((data >= 0) & (data <= 1)).all())


def _effective_count(data: npt.NDArray[np.float64], mean: float, level: float) -> float:
    """Return the number of independent single answers whose mean has the same variance as the mean of
    `data`."""
    count = len(data)
    variance = float(data.var())
    if bool(np.isin(data, (0.0, 1.0)).all()) or variance == 0:
        return float(count)
    effective = mean * (1 - mean) * count / variance
    # Only questions whose value is not at the nearer bound (0 or 1) contribute to the variance.
    informative = int((data != round(mean)).sum())
    if informative < 2:
        return min(effective, float(count))
    ratio = NormalDist().inv_cdf((1 + level) / 2) / t_quantile((1 + level) / 2, min(count, informative) - 1)
    return max(min(effective, float(count)), effective * ratio**2)


def _percentile_interval(data: npt.NDArray[np.float64], level: float, seed: int) -> tuple[float, float]:
    count = len(data)
    center = float(data.mean())
    means = _resampled_means(data, np.random.default_rng(seed))
    means = center + (means - center) * math.sqrt(count / (count - 1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(
    data: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    count = len(data)
    parts = [
        data[generator.integers(0, count, size=(size, count))].mean(axis=1)
        for size in _chunks(NUM_RESAMPLES, count)
    ]
    return np.concatenate(parts)


def _chunks(total: int, row_elements: int) -> list[int]:
    rows = max(1, _CHUNK_ELEMENTS // row_elements)
    return [min(rows, total - start) for start in range(0, total, rows)]
