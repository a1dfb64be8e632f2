"""Compute control rewards that do not depend on the right answer, as baselines for reward training."""

import hashlib
from collections.abc import Sequence
from typing import Any

from rlsc_mcore.grading.extraction import extract_boxed


def format_rewards(responses: Sequence[str], *_: Any) -> list[float]:
    """Return 1 for each response with a closed box, else 0."""
    return [float(extract_boxed(response) is not None) for response in responses]


def random_rewards(responses: Sequence[str], *_: Any) -> list[float]:
    """Return 0 or 1 with equal probability for each response; equal responses to a question get the same
    reward.

    The reward is one bit of a hash of the response and of all samples of its question. So it needs no state,
    is the same on every rank and after a resume, and differs between steps with different samples.
    """
    samples = hashlib.sha256()
    for response in sorted(responses):
        samples.update(hashlib.sha256(_encode(response)).digest())
    return [
        float(hashlib.sha256(samples.digest() + _encode(response)).digest()[0] & 1) for response in responses
    ]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
