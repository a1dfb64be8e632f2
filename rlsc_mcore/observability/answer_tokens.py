"""Measure the entropy of a step's answers apart from that of their reasoning.

OM-GRPO (arXiv 2608.03119) reports that the answer tokens, not the reasoning, drift when training collapses.
The mean of -log p over sampled tokens is an estimate of the mean entropy of the next token if the tokens are
samples of p.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlsc_mcore.grading.box_tokens import box_tokens
from rlsc_mcore.types import Rollout


class SurpriseSums(NamedTuple):
    """Sums over sampled tokens; -log p is in nats, of the engine and at the trained temperature."""

    answer: float  # sum of -log p over the tokens inside the last box of each rollout
    num_answer: int  # tokens of `answer`
    reasoning: float  # the same over all other tokens
    num_reasoning: int


def surprise_sums(rollouts: Sequence[Rollout], decode: Callable[[Sequence[int]], str]) -> SurpriseSums:
    """Sum -log p over the answer tokens and over the other tokens of `rollouts`.

    `decode` turns token ids into the text that is graded. A token that holds any character of the box's
    content is an answer token. A rollout without a complete box has none.
    """
    answer = reasoning = 0.0
    num_answer = num_reasoning = 0
    for rollout in rollouts:
        inside = box_tokens(rollout.response_ids, decode)
        inside_sum = sum(rollout.engine_log_probs[inside.start : inside.stop])
        answer -= inside_sum
        reasoning -= sum(rollout.engine_log_probs) - inside_sum
        num_answer += len(inside)
        num_reasoning += len(rollout.response_ids) - len(inside)
    return SurpriseSums(answer, num_answer, reasoning, num_reasoning)
