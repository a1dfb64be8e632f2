"""Detect a mismatch between trainer and engine by their log-probs of the same tokens, at every step.

Rounding gives a small, constant difference. Different weights give a large one. The limits are in nats; the
measurements are in docs/hot_swap.md. A correct run stays well below every limit, and a run with wrong engine
weights is far above them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Keys of metrics.jsonl: |trainer - engine| per token; |sum of (trainer - engine)| per answer.
GAPS = (
    "log_prob_gap_mean",
    "log_prob_gap_p99",
    "log_prob_gap_max",
    "log_prob_gap_sequence_mean",
    "log_prob_gap_sequence_max",
)
_NAMES = {
    "log_prob_gap_mean": "on average",
    "log_prob_gap_p99": "at the 99th percentile",
    "log_prob_gap_max": "at most",
}


@dataclass(frozen=True)
class Limits:
    """Limits of |trainer - engine| log-prob per token, in nats."""

    mean: float  # mean, p99, largest: a value above the limit gives a warning
    p99: float
    largest: float
    stop: float  # a step whose mean is above this counts towards stopping the run


LIMITS = {
    "float32": Limits(mean=3e-5, p99=3e-4, largest=1e-3, stop=1e-3),
    "bfloat16": Limits(mean=0.1, p99=1.0, largest=5.0, stop=0.4),
}


def coarser(*dtypes: str) -> str:
    """Return the data type whose limits apply if trainer and engine use different ones."""
    return "bfloat16" if "bfloat16" in dtypes else "float32"


def mismatch_warnings(row: Mapping[str, Any], dtype: str) -> list[str]:
    """Return at most one warning that lists the exceeded limits of a step; [] if there are no log-prob
    gaps."""
    limits = LIMITS[dtype]
    expected = {
        "log_prob_gap_mean": limits.mean,
        "log_prob_gap_p99": limits.p99,
        "log_prob_gap_max": limits.largest,
    }
    found = [
        f"{row[key]:.2e} {_NAMES[key]} (expected below {limit:g})"
        for key, limit in expected.items()
        if _exceeds(row, key, limit)
    ]
    return (
        [f"trainer and engine disagree on the log-probs of the sampled tokens: {', '.join(found)}"]
        if found
        else []
    )


def stop_limit(dtype: str, configured: float | None) -> float:
    """Return the mean gap per token, in nats, above which a step counts towards stopping the run."""
    return LIMITS[dtype].stop if configured is None else configured


def mismatched_steps(rows: Sequence[Mapping[str, Any]], limit: float) -> int:
    """Count the consecutive last steps whose mean gap per token is above `limit` or NaN."""
    count = 0
    for row in reversed(rows):
        if not _exceeds(row, "log_prob_gap_mean", limit):
            break
        count += 1
    return count


def _exceeds(row: Mapping[str, Any], key: str, limit: float) -> bool:
    value = row.get(key)
    return value is not None and not value <= limit  # NaN exceeds every limit
