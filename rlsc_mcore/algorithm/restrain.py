"""RESTRAIN (arXiv 2510.02172): train on every answer of a question as a pseudo-label, weighted by its share.

With f_j the share of the question's samples whose answer is a_j, and A_j(y) the GRPO advantage (mean
subtracted, divided by the standard deviation) of the reward 1[answer of y = a_j]:

    w_j = g(f_j) / sum_i g(f_i),   g(f) = exp(-(f - CENTER)^2 / (2 WIDTH^2))
    A(y) = sum_j w_j A_j(y)   if the largest share is at least FEWEST, else  A(y) = -PENALTY

loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t. In the first update this equals the
paper's sum_j w_j loss_j. Later updates clip the combined advantage instead of each term. The paper's weight of
the question, from a frozen base model, is 1 here. The four constants are not the paper's: choose them per model.
"""

import math
from collections.abc import Sequence

from rlsc_mcore.algorithm.group_reward import GroupReward
from rlsc_mcore.grading.rewards import answer_shares, group_advantages
from rlsc_mcore.types import Question

CENTER, WIDTH, FEWEST, PENALTY = 1.0, 0.5, 0.2, 0.5


class Restrain(GroupReward):
    """Weight each sample by `restrained_advantages`."""


def restrained_advantages(
    responses: Sequence[str], question: Question | None = None, answers: str = "boxed"
) -> list[float]:
    """Return A of each response to one question. A response without an answer agrees with no pseudo-label."""
    labels, shares = answer_shares(responses, question, answers)
    share_of = {label: share for label, share in zip(labels, shares, strict=True) if label >= 0}
    if max(share_of.values(), default=0.0) < FEWEST:
        return [-PENALTY] * len(responses)
    weights = {
        label: math.exp(-((share - CENTER) ** 2) / (2 * WIDTH**2)) for label, share in share_of.items()
    }
    total = sum(weights.values())
    combined = [0.0] * len(responses)
    for label, weight in weights.items():
        agrees = [float(each == label) for each in labels]
        advantages = group_advantages(agrees, [0] * len(labels), standardize=True)
        combined = [a + weight / total * b for a, b in zip(combined, advantages, strict=True)]
    return combined
