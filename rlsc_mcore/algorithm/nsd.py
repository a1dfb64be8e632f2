"""Negative self-distillation (NSD, arXiv 2609.11699, eq. 2-5): unlearn what a careless prompt makes likelier.

    loss = - sum_y sum_t c_t log p(y_t), whose gradient is that of
    L = sum_t G_t / (2 - p(y_t)) + beta p0(y_t) log(p0(y_t) / p(y_t))
    G_t = max(0, p0(y_t | x, n) - p0(y_t | x))

p is the policy, p0 are the starting weights, and n is a prompt that asks for a careless answer:

    c_t = beta p0 - G_t p / (2 - p)^2

A token that the careless prompt makes likelier becomes less likely, and the second term holds the policy at
p0. One sample per question is enough, without labels, votes or rewards. beta is `algorithm.nsd_kl`.
"""

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences


class Nsd(ObjectiveRule):
    """Weight each token by its log-probs after the question and after the careless prompt."""

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return 1 for every trained sequence and 0 for the others, float64 [S]."""
        assert scored.advantages_S is not None, "nsd marks its trained sequences"
        return scored.advantages_S

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return c, float64 [T]; 0 in a sequence without a careless prompt."""
        start_T, careless_T = scored.start_log_probs_T, scored.careless_log_probs_T
        assert start_T is not None and careless_T is not None, "nsd needs two passes of the starting weights"
        p_T = scored.policy_log_probs_T.double().exp()
        p0_T = start_T.double().exp()
        gap_T = (careless_T.double().exp() - p0_T).clamp(min=0.0)
        trained_T = scored.over_tokens(self.sequence_weights(scored))
        return trained_T * (self.algorithm.nsd_kl * p0_T - gap_T * p_T / (2 - p_T) ** 2)
