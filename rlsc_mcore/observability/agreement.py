"""Measure without labels how a policy's answers agree: within a question, and across different questions.

The answers of a step are sampled before the step trains on them. In the first pass over the questions the
agreement is therefore that on questions the policy has not seen. Agreement within a question rises as a
policy sharpens; the same answer to different questions, or no answer at all, is collapse.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rlsc_mcore.grading.answers import answer_key
from rlsc_mcore.grading.extraction import extract_boxed, extract_last_number, extract_stated

KEY_BITS = 48  # of an answer's digest; exact in float64


class Agreement(NamedTuple):
    """Label-free statistics of a step's answers, as fields of `StepMetrics`; fractions between 0 and 1."""

    agreement: float  # mean over questions: samples with the question's most frequent answer
    answered_share: float  # samples with an answer that can be read
    distinct_answers: float  # mean over questions: different answers / samples
    same_answer_share: float  # questions whose most frequent answer is the one shared by most questions


def read_answer(text: str) -> str | None:
    """Return a key of the answer in a response (its box, else the stated answer, else the last number), or
    None."""
    answer = extract_boxed(text) or extract_stated(text) or extract_last_number(text)
    return None if answer is None else answer_key(answer)


def question_row(keys: Sequence[str | None]) -> list[float]:
    """Reduce the answers of one question to [samples, answered, of the most frequent answer, different
    answers, digest of the most frequent one; -1 without answers]."""
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return [len(keys), 0.0, 0.0, 0.0, -1.0]
    plurality, most = counts.most_common(1)[0]
    digest = int.from_bytes(hashlib.sha256(plurality.encode()).digest()[: KEY_BITS // 8], "big")
    return [len(keys), sum(counts.values()), most, len(counts), float(digest)]


def summarise(rows: Sequence[Sequence[float]]) -> Agreement:
    """Combine the rows of all questions of a step."""
    if not rows:
        return Agreement(0.0, 0.0, 0.0, 0.0)
    shared = Counter(row[4] for row in rows if row[4] >= 0)
    return Agreement(
        agreement=sum(row[2] / row[0] for row in rows) / len(rows),
        answered_share=sum(row[1] for row in rows) / sum(row[0] for row in rows),
        distinct_answers=sum(row[3] / row[0] for row in rows) / len(rows),
        same_answer_share=max(shared.values(), default=0) / len(rows),
    )
