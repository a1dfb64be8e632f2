"""RENT (arXiv 2505.22660): reward each answer by the negative entropy of its tokens.

    u(y) = - 1/|y| sum_t H(p(.|x, y_<t))

loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t, with A the reward u minus the mean of
its question, divided by the standard deviation (GRPO). Unlike `entropy` the gradient does not pass through the
entropies: samples with a lower entropy become more likely. p is taken at the trained temperature.
"""

import torch

from rlsc_mcore.algorithm.pass_reward import PassReward
from rlsc_mcore.algorithm.rule import GroupSamples


class Rent(PassReward):
    """Reward an answer by the negative mean entropy of its tokens."""

    pass_value = "entropy"

    def rewards(self, samples: GroupSamples) -> torch.Tensor:
        """Return the negative mean entropies, float64 [S]."""
        return -super().rewards(samples)
