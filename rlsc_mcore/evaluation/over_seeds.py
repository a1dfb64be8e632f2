"""Average scores over the seeds of an experiment."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from rlsc_mcore.evaluation.records import AnswerRecord, question_means
from rlsc_mcore.evaluation.sampling_scores import majority_accuracy
from rlsc_mcore.evaluation.scores import GREEDY, UNTEMPERED, estimate, score_key
from rlsc_mcore.evaluation.statistics import PairedChange, bootstrap_interval, crossed_change, paired_change


def metric_names(temperatures: Sequence[float], num_samples: int = 1) -> dict[str, tuple[float, str]]:
    """Return the metrics of an experiment: name -> (temperature, field of the answers).

    With several samples per question and temperature, pass@k, maj@k and the share of distinct answers are
    added: over all samples at the highest temperature.
    """
    hottest = max(temperatures, default=GREEDY)
    names = {score_key("accuracy", t): (t, "strict") for t in (*temperatures, GREEDY)}
    names |= {score_key("lenient", t): (t, "lenient") for t in (*temperatures, GREEDY)}
    if UNTEMPERED in temperatures:
        names["confidence_f"] = (UNTEMPERED, "probability")
    names |= {"boxed_share": (hottest, "boxed"), "mean_length": (hottest, "tokens")}
    if num_samples > 1 and hottest > GREEDY:
        names |= {f"pass@{num_samples}": (hottest, "any_right"), f"maj@{num_samples}": (hottest, "majority")}
        names["distinct_share"] = (hottest, "distinct")
    return names


def seed_average(
    per_seed: Sequence[Sequence[AnswerRecord]], temperature: float, field: str
) -> dict[int, float]:
    """Return the mean per question, averaged over its answers and then over seeds: question -> mean.

    Only questions that every seed has are returned. The question remains the sampling unit.
    """
    parts = [_question_values(answers, temperature, field) for answers in per_seed]
    shared = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {question: sum(part[question] for part in parts) / len(parts) for question in sorted(shared)}


def summarize(
    before: Sequence[Sequence[AnswerRecord]],
    after: Sequence[Sequence[AnswerRecord]],
    names: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare one variant with the base; `before` and `after` hold the answers of each seed.

    Returns per metric: mean, standard error and interval; `per_seed` means and their standard deviation; and
    the paired change over questions with interval and p-value. With two or more paired seeds,
    `change.over_seeds` is the change over questions and seeds.
    """
    rows: dict[str, Any] = {}
    for name, (temperature, field) in names.items():
        first, second = seed_average(before, temperature, field), seed_average(after, temperature, field)
        if not first.keys() & second.keys():
            continue
        change = paired_change(first, second)
        value = estimate(list(second.values()))
        low, high = bootstrap_interval(list(second.values()))
        per_seed = [_mean(seed_average([answers], temperature, field)) for answers in after]
        rows[name] = {
            "mean": value["mean"],
            "standard_error": value["standard_error"],
            "low": low,
            "high": high,
            "per_seed": per_seed,
            "seed_spread": _spread(per_seed),
            "change": {
                "mean": change.mean,
                "standard_error": change.standard_error,
                "low": change.low,
                "high": change.high,
                "p_value": change.p_value,
                "over_seeds": _over_seeds(before, after, temperature, field, change),
            },
        }
    return rows


def _over_seeds(
    before: Sequence[Sequence[AnswerRecord]],
    after: Sequence[Sequence[AnswerRecord]],
    temperature: float,
    field: str,
    over_questions: PairedChange,
) -> dict[str, Any] | None:
    """Return the change over questions and seeds, or None if there are fewer than two paired seeds.

    Its interval contains the interval over questions alone, and its p-value is at least as large.
    """
    if len(before) != len(after):
        return None
    first, second = (
        [seed_average([answers], temperature, field) for answers in side] for side in (before, after)
    )
    change = crossed_change(first, second)
    if change is None:
        return None
    return asdict(change) | {
        "low": min(change.low, over_questions.low),
        "high": max(change.high, over_questions.high),
        "p_value": max(change.p_value, over_questions.p_value),
    }


def _question_values(answers: Sequence[AnswerRecord], temperature: float, field: str) -> dict[int, float]:
    """Return question -> value of `field`: a mean over its answers, or a number that needs all of them."""
    if field == "probability":
        return _probabilities(answers, temperature)
    if field not in _OF_ALL_SAMPLES:
        return question_means(answers, temperature, field)
    groups: dict[int, list[AnswerRecord]] = {}
    for answer in answers:
        if answer.temperature == temperature:
            groups.setdefault(answer.question, []).append(answer)
    return {question: _OF_ALL_SAMPLES[field](tuple(group)) for question, group in sorted(groups.items())}


@cache  # every pair of variants asks for the same votes again
def _majority(group: tuple[AnswerRecord, ...]) -> float:
    return majority_accuracy(group)


_OF_ALL_SAMPLES: dict[str, Callable[[tuple[AnswerRecord, ...]], float]] = {
    "any_right": lambda group: float(any(answer.strict for answer in group)),
    "majority": _majority,
    "distinct": lambda group: len({answer.text for answer in group}) / len(group),
}


def _probabilities(answers: Sequence[AnswerRecord], temperature: float) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for answer in answers:
        if answer.temperature == temperature and answer.log_prob is not None:
            values.setdefault(answer.question, []).append(math.exp(answer.log_prob))
    return {question: sum(part) / len(part) for question, part in sorted(values.items())}


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    center = sum(values) / len(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))
