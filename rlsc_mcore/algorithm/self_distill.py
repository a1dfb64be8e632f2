"""Self-distillation: loss = sum_y v(y) sum_t clip D(sg p_t || q_t) - sum_y r(y) log p(y|x), without labels.

q_t is the policy's distribution of token t of a rollout y, over the full vocabulary. p_t is the teacher's, of
the same token: the current or the starting weights, which also see an agreeing rollout of the question in
their prompt. D is the forward KL or the JSD. The plurality of a question's parsed answers decides which
rollouts agree. v and r are constants per rollout:

    U-OPSD (arXiv 2608.06296)   v = 1 for disagreeing rollouts; forward KL from the current weights
    CANON (arXiv 2607.13643)    v = 1 for all rollouts; JSD from the starting weights
    TTPO (arXiv 2608.27448)     v = 1 for agreeing rollouts; r = -penalty * share of the plurality for
                                disagreeing rollouts that are at least as confident as their question's mean

A question whose plurality has less than `min_share` of its rollouts, or all of them, is not trained.
`UniqueSequence.advantage` carries v if positive and r if negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences
from rlsc_mcore.config import DistillConfig


class SelfDistill(ObjectiveRule):
    """Weight each sample by its value from `teach`; the head distils positive values and penalises negative
    ones."""

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return r, the weight of -log p of each sequence, float64 [S]: 0 or negative."""
        assert scored.advantages_S is not None, "self-distillation needs its samples compared first"
        return scored.advantages_S.clamp(max=0.0)


@dataclass(frozen=True)
class Teaching:
    """What is trained on the rollouts of one question."""

    values: list[float]  # per rollout: v if positive, r if negative
    context: int | None  # position of the rollout that the teacher sees; None: the question is not trained


def teach(
    classes: Sequence[int],
    texts: Sequence[str],
    lengths: Sequence[int],
    mean_log_probs: Sequence[float],
    options: DistillConfig,
) -> Teaching:
    """Choose the teacher's context and the values of the rollouts of one question.

    `classes` numbers the equal answers, -1 for a rollout without an answer. Ties go to the answer that was
    sampled first, and to the first rollout. Rollouts with the same text get the same value.
    """
    counts = [classes.count(label) for label in range(max(classes, default=-1) + 1)]
    nothing = Teaching([0.0] * len(classes), None)
    if not counts:
        return nothing
    plurality = counts.index(max(counts))
    share = counts[plurality] / len(classes)
    if share < options.min_share or share == 1.0:
        return nothing
    agrees = [label == plurality for label in classes]
    key = lengths if options.context == "longest" else mean_log_probs
    context = max((i for i, agreeing in enumerate(agrees) if agreeing), key=lambda i: (key[i], -i))
    first = {text: position for position, text in reversed(list(enumerate(texts)))}
    mean = sum(mean_log_probs[first[text]] for text in texts) / len(texts)
    values = []
    for agreeing, text in zip(agrees, texts, strict=True):
        taught = options.tokens == "all" or agreeing == (options.tokens == "agreeing")
        is_confident = mean_log_probs[first[text]] >= mean
        penalty = options.penalty * share if not agreeing and is_confident else 0.0
        values.append(1.0 if taught else -penalty)
    return Teaching(values, context)
