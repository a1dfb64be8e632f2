"""Compute scores that need several samples per question: pass@k, maj@k, and calibration of the confidence."""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.evaluation.scores import estimate
from rlsc_mcore.grading.rewards import answer_classes

NUM_BINS = 10
MAX_SUBSETS = 200  # subsets of a question's answers over which maj@k is averaged


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence."""

    confidence: float  # mean probability of the answers in it
    accuracy: float
    count: int


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k samples, drawn without replacement, is right.

    The unbiased estimate is 1 - C(n - c, k) / C(n, k). Raises ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass@k: expected 1 <= k <= {num_samples} and 0 to {num_samples} right, got k = {k}, "
            f"{num_right} right"
        )
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_accuracy(answers: Sequence[AnswerRecord]) -> float:
    """Return 1 if the most frequent answer is right, else 0; of equally frequent answers, the right fraction.

    Answers that are neither boxed nor `strict` (by `evaluation.grader`) have no vote.
    """
    return majority_at_k(answers, len(answers))


def majority_at_k(answers: Sequence[AnswerRecord], k: int) -> float:
    """Return `majority_accuracy` averaged over subsets of k answers.

    If there are at most 200 subsets, all are used; otherwise 200 subsets are drawn with a fixed seed.
    """
    votes, is_right = _votes(answers)
    if math.comb(len(answers), k) <= MAX_SUBSETS:
        subsets: Iterable[Sequence[int]] = itertools.combinations(range(len(answers)), k)
    else:
        stream = random.Random(f"maj@{k}/{len(answers)}")
        subsets = [stream.sample(range(len(answers)), k) for _ in range(MAX_SUBSETS)]
    outcomes = [_majority([votes[i] for i in subset], is_right) for subset in subsets]
    return math.fsum(outcomes) / len(outcomes)


def _votes(answers: Sequence[AnswerRecord]) -> tuple[list[int], dict[int, bool]]:
    """Return the class of each answer (-1: no vote), and class -> whether its first answer is right."""
    votes = answer_classes(
        [answer.extracted if answer.boxed or answer.strict else None for answer in answers]
    )
    return votes, {label: answers[votes.index(label)].strict for label in set(votes) if label >= 0}


def _majority(votes: Sequence[int], is_right: Mapping[int, bool]) -> float:
    counts = {label: votes.count(label) for label in set(votes) if label >= 0}
    if not counts:
        return 0.0
    winners = [label for label, count in counts.items() if count == max(counts.values())]
    return sum(is_right[label] for label in winners) / len(winners)


def sampling_scores(answers: Sequence[AnswerRecord], temperature: float) -> dict[str, Any]:
    """Score all answers at one temperature; return name -> mean and standard error over questions.

    The scores are avg@n over all n samples; pass@k for each power of two up to n and for n; maj@k for every k
    up to n; and the median length. If every answer has a log-prob, also the mean log p and `calibration`.
    """
    groups: dict[int, list[AnswerRecord]] = {}
    for answer in answers:
        if answer.temperature == temperature:
            groups.setdefault(answer.question, []).append(answer)
    if not groups:
        return {}
    count = min(len(group) for group in groups.values())
    scores: dict[str, Any] = {}
    sizes = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    scores[f"avg@{count}"] = estimate(
        [sum(a.strict for a in group) / len(group) for group in groups.values()]
    )
    for k in sizes:
        scores[f"pass@{k}"] = estimate(
            [pass_at_k(len(g), sum(a.strict for a in g), k) for g in groups.values()]
        )
    for k in range(1, count + 1):
        scores[f"maj@{k}"] = estimate([majority_at_k(group, k) for group in groups.values()])
    lengths = [answer.tokens for group in groups.values() for answer in group]
    scores["median_length"] = {"mean": float(np.median(lengths)), "standard_error": None}
    scored = [answer for group in groups.values() for answer in group if answer.log_prob is not None]
    if len(scored) == len(lengths):
        scores["mean_log_prob"] = estimate(
            [sum(a.log_prob or 0.0 for a in g) / len(g) for g in groups.values()]
        )
        scores["calibration"] = calibration(groups)
    return scores


def calibration(groups: Mapping[int, Sequence[AnswerRecord]]) -> dict[str, Any]:
    """Measure whether answers with a higher log p(y|x) are right more often.

    `auroc`: probability that a right answer has a higher log p(y|x) than a wrong one, over all pairs.
    `auroc_within`: the same over pairs of answers to one question; it is not affected by the fact that easy
    questions have short, likely answers. For both, 0.5 means no relation, and None means that there is no
    pair. `bins`: reliability curve of p(y|x). `expected_error`: mean |confidence - accuracy| over answers.
    """
    everything = [answer for group in groups.values() for answer in group]
    bins = reliability(
        [math.exp(min(0.0, a.log_prob or 0.0)) for a in everything], [a.strict for a in everything]
    )
    pairs = [
        _pairs([a.log_prob or 0.0 for a in group], [a.strict for a in group]) for group in groups.values()
    ]
    total = sum(number for _, number in pairs)
    return {
        "auroc": auroc([a.log_prob or 0.0 for a in everything], [a.strict for a in everything]),
        "auroc_within": sum(wins for wins, _ in pairs) / total if total else None,
        "expected_error": sum(part.count * abs(part.confidence - part.accuracy) for part in bins)
        / len(everything),
        "bins": [vars(part) for part in bins],
    }


def auroc(values: Sequence[float], is_right: Sequence[bool]) -> float | None:
    """Return the probability that a right answer has a higher value than a wrong one; ties count half.

    None if all answers are right or all are wrong.
    """
    wins, pairs = _pairs(values, is_right)
    return wins / pairs if pairs else None


def reliability(
    confidences: Sequence[float], is_right: Sequence[bool], num_bins: int = NUM_BINS
) -> list[Bin]:
    """Sort answers by confidence into bins of equal count and return the means of each bin.

    Answers with equal confidence are in the same bin.
    """
    order = np.argsort(np.asarray(confidences), kind="stable")
    values, rights = (
        np.asarray(confidences, dtype=np.float64)[order],
        np.asarray(is_right, dtype=np.float64)[order],
    )
    edges = np.linspace(0, len(values), num_bins + 1).round().astype(int)
    starts = sorted({int(np.searchsorted(values, values[edge])) for edge in edges[:-1] if edge < len(values)})
    parts = zip(starts, [*starts[1:], len(values)], strict=True)
    return [Bin(float(values[a:b].mean()), float(rights[a:b].mean()), b - a) for a, b in parts if b > a]


def _pairs(values: Sequence[float], is_right: Sequence[bool]) -> tuple[float, int]:
    """Count the pairs in which the right answer has the higher value (ties half); return (count, all
    pairs)."""
    data, flags = np.asarray(values, dtype=np.float64), np.asarray(is_right, dtype=bool)
    wrong = np.sort(data[~flags])
    right = data[flags]
    below, up_to = np.searchsorted(wrong, right, side="left"), np.searchsorted(wrong, right, side="right")
    return float((below + up_to).sum()) / 2, len(right) * len(wrong)
