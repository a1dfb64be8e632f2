"""Group-relative policy gradient: loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t.

A(y) is the reward minus the mean reward of its question, optionally divided by the standard deviation (GRPO,
arXiv 2402.03300). r_t is the ratio of the token's probability to that under the policy that sampled. k3_t =
exp(-log r_t) + log r_t - 1 estimates the KL divergence between them. Token losses are summed and samples are
averaged with constant divisors, as in Dr. GRPO (arXiv 2503.20783), so the length of an answer does not change
its weight. In the first update r_t = 1 and the gradient is A grad log p.
"""

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences


class GroupReward(ObjectiveRule):
    """Weight each sample by its advantage. Later updates on the same rollouts use the clipped ratio."""

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the advantages, float64 [S]."""
        assert scored.advantages_S is not None, "an objective with a reward needs its samples graded first"
        return scored.advantages_S

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return the coefficient of -grad log p of each token, float64 [T]; None in the first update, where
        every coefficient is A."""
        if scored.current_log_probs_T is None:
            return None
        log_ratio_T = (scored.current_log_probs_T - scored.token_log_probs_T).double()
        ratio_T = log_ratio_T.exp()
        lengths_S = scored.cu_seqlens.diff().long()
        advantage_T = torch.repeat_interleave(
            self.sequence_weights(scored), lengths_S, output_size=len(ratio_T)
        )
        is_clipped = (advantage_T > 0) & (ratio_T > 1 + self.algorithm.clip_high)
        is_clipped |= (advantage_T < 0) & (ratio_T < 1 - self.algorithm.clip_low)
        weights_T = torch.where(is_clipped, 0.0, advantage_T * ratio_T)
        return weights_T - self.algorithm.kl * (1 - (-log_ratio_T).exp())
