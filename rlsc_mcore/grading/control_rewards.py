"""Rewards that know nothing of the right answer: controls for what a reward-trained model gains."""

import hashlib
from collections.abc import Sequence
from typing import Any

from rlsc_mcore.grading.extraction import extract_boxed


def format_rewards(responses: Sequence[str], *_: Any) -> list[float]:
    """Return 1 for each response with a closed box, else 0."""
    return [float(extract_boxed(response) is not None) for response in responses]


def random_rewards(responses: Sequence[str], *_: Any) -> list[float]:
    """Return 0 or 1 for each response, with equal chance; equal responses to one question get the same.

    The coin is a hash of the response and of all samples of its question, so that it needs no state, is the
    same on every rank and after a resume, and falls anew for the same response in another step.
    """
    samples = hashlib.sha256()
    for response in sorted(responses):
        samples.update(hashlib.sha256(_encode(response)).digest())
    return [
        float(hashlib.sha256(samples.digest() + _encode(response)).digest()[0] & 1) for response in responses
    ]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
