"""Compute scores of sampled answers with standard errors; the question is the sampling unit.

Samples of one question are not independent. So a score is the mean over questions of the mean per question,
and its standard error is that of the question means. This is clustering by question with equal weights.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict

import numpy as np

from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.evaluation.statistics import CONFIDENCE_LEVEL, wilson_interval

GREEDY = 0.0
UNTEMPERED = 1.0
_RULES = {"accuracy": "boxed", "lenient": "last number"}
_LABELS = {
    "greedy": "accuracy, greedy (boxed)",
    "lenient_greedy": "accuracy, greedy (last number)",
    "confidence_f": "F, chance that two samples agree",
    "boxed_share": "answers that are boxed",
    "distinct_share": "distinct answers",
    "truncated_share": "answers cut at the length limit",
    "mean_length": "mean length in tokens",
}
HIGHEST_TEMPERATURE_SCORES = ("boxed_share", "mean_length", "truncated_share", "distinct_share")


class Estimate(TypedDict):
    """A mean over questions with its standard error, which is None for a single question."""

    mean: float
    standard_error: float | None


def score_key(kind: str, temperature: float) -> str:
    """Return the key of `accuracy` or `lenient` at a temperature: `accuracy_t0.5`, `lenient_t1`, `greedy`.

    Different temperatures have different keys: if `:g` loses digits, all digits are kept.
    """
    if temperature == GREEDY:
        return "greedy" if kind == "accuracy" else f"{kind}_greedy"
    short = f"{temperature:g}"
    return f"{kind}_t{short if float(short) == temperature else repr(float(temperature))}"


def score_label(key: str, highest_temperature: float | None = None) -> str:
    """Return the label of a score for tables and figures.

    `highest_temperature` is added to the scores that are reported at the highest temperature only.
    """
    if key in _LABELS:
        at_highest = key in HIGHEST_TEMPERATURE_SCORES and highest_temperature is not None
        return _LABELS[key] + (f", T = {highest_temperature:g}" if at_highest else "")
    kind, separator, temperature = key.partition("_t")
    return f"accuracy, T = {temperature} ({_RULES[kind]})" if separator and kind in _RULES else key


def key_temperature(key: str) -> float | None:
    """Return the temperature in a key made by `score_key`; None for greedy answers and other scores."""
    kind, separator, temperature = key.partition("_t")
    return float(temperature) if separator and kind in _RULES else None


def estimate(question_means: Sequence[float]) -> Estimate:
    """Return the mean of one number per question and its standard error.

    The standard error is the sample standard deviation / sqrt(questions). Where all questions are right, or
    all wrong, that would be 0, as if the share were known exactly; it is then half of Wilson's interval, in
    units of one standard error.
    """
    if not question_means:
        raise ValueError("scores need at least one question")
    values = np.asarray(question_means, dtype=np.float64)
    count = len(values)
    standard_error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    if standard_error == 0 and values[0] in (0.0, 1.0):
        low, high = wilson_interval(float(values[0]), count)
        standard_error = (high - low) / (2 * NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2))
    return Estimate(mean=float(values.mean()), standard_error=standard_error)


def question_scores(samples: Sequence[AnswerRecord]) -> dict[str, float]:
    """Return the mean of each score over the samples of one question.

    `confidence_f` is present only if every sample has a log-prob. It is the mean of exp(sum of log p) over
    answers sampled from p, an unbiased estimate of F = sum_y p(y)^2.
    """
    if not samples:
        raise ValueError("a question needs at least one sample")
    count = len(samples)
    scores = {
        "accuracy": sum(sample.strict for sample in samples) / count,
        "lenient": sum(sample.lenient for sample in samples) / count,
        "boxed_share": sum(sample.boxed for sample in samples) / count,
        "mean_length": sum(sample.tokens for sample in samples) / count,
        "truncated_share": sum(sample.truncated for sample in samples) / count,
        "distinct_share": len({sample.text for sample in samples}) / count,
    }
    log_probs = [sample.log_prob for sample in samples if sample.log_prob is not None]
    if len(log_probs) == count:
        scores["confidence_f"] = math.fsum(map(math.exp, log_probs)) / count
    return scores


def score(questions: Sequence[Sequence[AnswerRecord]]) -> dict[str, Estimate]:
    """Return each score over questions (outer sequence) and samples (inner sequence; lengths may differ)."""
    per_question = [question_scores(samples) for samples in questions]
    return {name: estimate([scores[name] for scores in per_question]) for name in _shared_names(per_question)}


def _shared_names(per_question: Sequence[dict[str, float]]) -> list[str]:
    if not per_question:
        raise ValueError("scores need at least one question")
    return [name for name in per_question[0] if all(name in scores for scores in per_question)]
