"""Group-relative policy gradient: loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t.

A(y) is the reward minus the mean reward of its question, optionally divided by the standard deviation (GRPO,
arXiv 2402.03300). r_t is the ratio of the token's probability to that under the policy that sampled. k3_t =
exp(-log r_t) + log r_t - 1 estimates the KL divergence between them. `kl_start` adds the same estimate of the
divergence from the starting weights. Token losses are summed and samples are averaged with constant divisors,
as in Dr. GRPO (arXiv 2503.20783), so the length of an answer does not change its weight. In the first update
r_t = 1 and the gradient is A grad log p.
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
        every coefficient is A, without a penalty for the distance from the starting weights."""
        start_T, current_T = scored.start_log_probs_T, scored.policy_log_probs_T
        if scored.current_log_probs_T is None and start_T is None:
            return None
        ratio_T = (current_T - scored.token_log_probs_T).double().exp()
        advantage_T = scored.over_tokens(self.sequence_weights(scored))
        is_clipped = (advantage_T > 0) & (ratio_T > 1 + self.algorithm.clip_high)
        is_clipped |= (advantage_T < 0) & (ratio_T < 1 - self.algorithm.clip_low)
        weights_T = torch.where(is_clipped, 0.0, advantage_T * ratio_T)
        weights_T = weights_T - self.algorithm.kl * _k3_slope(scored.token_log_probs_T, current_T)
        if start_T is None:
            return weights_T
        return weights_T - self.algorithm.kl_start * _k3_slope(start_T, current_T)


def _k3_slope(reference_T: torch.Tensor, current_T: torch.Tensor) -> torch.Tensor:
    """Return the derivative of each token's k3 by its current log-prob, float64 [T]."""
    return 1 - (reference_T - current_T).double().exp()
