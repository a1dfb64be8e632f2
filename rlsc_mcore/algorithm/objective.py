"""The weights of each objective: what multiplies -log p of every answer token.

    rlsc      loss = - sum_y (confidence(y) + alpha) log p(y|x),  confidence frozen        L1: alpha = 0, L2: alpha > 0
    self_sft  loss = - sum_y log p(y|x)
    ttrl      loss = - sum_y (reward(y) - mean reward) log p(y|x),  reward 1 where y agrees with the question's majority
    rlvr      the same, reward 1 where y is right by its label
    entropy   loss = sum_y sum_t H(p(.|x, y_<t)),  no weight: the gradient passes through the entropy itself

Every one is only another way to weight the same tokens (the last one their entropies), so they share sampling, packing,
kernels and optimizer.
"""

import math
from dataclasses import dataclass

import torch

from rlsc_mcore.algorithm.confidence import log_confidence
from rlsc_mcore.config import AlgorithmConfig


@dataclass(frozen=True)
class WeightedObjective:
    """Turns the log-probs of a pass into the coefficients of its tokens; holds what does not change within a step."""

    algorithm: AlgorithmConfig
    num_samples: int  # rollouts of the step over all ranks: the divisor of `reduction=mean`

    def weights(
        self,
        token_log_probs_T: torch.Tensor,
        response_mask_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        log_normalizer_S: torch.Tensor | None = None,
        advantages_S: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the weight of one sample of each sequence, confidence + alpha; `token` averages over its tokens.

        Detached float32 [T], bool [T], int32 [S + 1] -> float64 [S]; computed as exp(logaddexp(log confidence, log alpha)).
        With a reward the weight is the advantage; self-SFT and entropy weigh every sample 1.
        """
        kind = self.algorithm.confidence
        if self.needs_rewards:
            assert advantages_S is not None, "an objective with a reward needs its samples graded first"
            return advantages_S
        if self.algorithm.objective != "rlsc":
            return torch.ones(len(cu_seqlens) - 1, dtype=torch.float64, device=cu_seqlens.device)
        if kind == "token":
            per_token = self._plus_alpha(token_log_probs_T.double())
            return log_confidence(per_token, response_mask_T, cu_seqlens, "length_normalized")
        return self._plus_alpha(log_confidence(token_log_probs_T, response_mask_T, cu_seqlens, kind, log_normalizer_S))

    def token_coefficients(
        self,
        token_log_probs_T: torch.Tensor,
        response_mask_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        multiplicity_S: torch.Tensor,
        log_normalizer_S: torch.Tensor | None = None,
        advantages_S: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute c with loss = -sum_t c_t log p_t: weight x multiplicity (/ num_samples), 0 outside the response mask.

        Detached float32 [T], bool [T], int32 [S + 1], float64 [S] -> float32 [T]. No host synchronisation.
        """
        scale_S = multiplicity_S / self.num_samples if self.algorithm.reduction == "mean" else multiplicity_S
        if self.algorithm.objective == "rlsc" and self.algorithm.confidence == "token":
            factor_T = self._plus_alpha(token_log_probs_T.double())
        else:
            scale_S = scale_S * self.weights(token_log_probs_T, response_mask_T, cu_seqlens, log_normalizer_S, advantages_S)
            factor_T = torch.ones_like(token_log_probs_T, dtype=torch.float64)
        lengths_S = cu_seqlens.diff().long()
        scale_T = torch.repeat_interleave(scale_S, lengths_S, output_size=len(token_log_probs_T))
        return torch.where(response_mask_T, scale_T * factor_T, 0.0).float()

    @property
    def needs_group(self) -> bool:
        """True when a weight depends on the other samples of its question, so that all must be scored first."""
        return self.algorithm.objective == "rlsc" and self.algorithm.confidence == "group_softmax"

    @property
    def needs_rewards(self) -> bool:
        """True when the weight is a reward minus its question's mean, so that the samples must be graded first."""
        return self.algorithm.objective in ("ttrl", "rlvr")

    @property
    def trains_entropy(self) -> bool:
        """True when the loss is the tokens' entropy: it has no coefficients, its gradient passes through every logit."""
        return self.algorithm.objective == "entropy"

    @property
    def alpha(self) -> float:
        """The alpha in effect: 0 for objectives without one."""
        return self.algorithm.alpha if self.algorithm.objective == "rlsc" else 0.0

    def _plus_alpha(self, log_values: torch.Tensor) -> torch.Tensor:
        if self.algorithm.alpha == 0:
            return log_values.exp()
        log_alpha = torch.full_like(log_values, math.log(self.algorithm.alpha))
        return torch.logaddexp(log_values, log_alpha).exp()


def entropy_loss(
    token_entropy_T: torch.Tensor, response_mask_T: torch.Tensor, cu_seqlens: torch.Tensor, multiplicity_S: torch.Tensor, divisor: float
) -> torch.Tensor:
    """Compute the samples' summed token entropy / divisor; differentiable in the entropies.

    float32 [T], bool [T], int32 [S + 1], float64 [S] -> float64 []. `divisor` is the number of samples for a mean, 1 for a sum.
    """
    lengths_S = cu_seqlens.diff().long()
    counts_T = torch.repeat_interleave(multiplicity_S, lengths_S, output_size=len(token_entropy_T))
    return torch.where(response_mask_T, token_entropy_T.double() * counts_T, 0.0).sum() / divisor
