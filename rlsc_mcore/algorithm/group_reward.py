"""Reward minus the mean reward of the question: loss = - sum_y (reward(y) - mean reward) log p(y|x).

With the majority's answer as reward this is TTRL's vote (arXiv 2504.16084) without its clipping, with labels RLVR.
"""

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences


class GroupReward(ObjectiveRule):
    """Weigh each sample by its advantage."""

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the advantages, float64 [S]."""
        assert scored.advantages_S is not None, "an objective with a reward needs its samples graded first"
        return scored.advantages_S
