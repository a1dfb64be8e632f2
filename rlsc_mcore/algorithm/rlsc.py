"""RLSC (arXiv 2506.06395): loss = - sum_y (confidence(y) + alpha) log p(y|x); the confidence is detached.

alpha = 0 is the paper's L1 (the gradient of F = sum_y p(y|x)^2), alpha > 0 its L2. `token` replaces the
sample's confidence with each token's own probability.
"""

import math

import torch

from rlsc_mcore.algorithm.confidence import log_confidence
from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences


class Rlsc(ObjectiveRule):
    """Weight each sample by exp(logaddexp(log confidence, log alpha)), which is accurate for small
    confidences."""

    @property
    def needs_group(self) -> bool:
        """True for `group_softmax`, which divides by the sum over the question's samples."""
        return self.algorithm.confidence == "group_softmax"

    @property
    def alpha(self) -> float:
        """`algorithm.alpha`."""
        return self.algorithm.alpha

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return confidence + alpha, float64 [S]; for `token` the average over the sample's tokens."""
        kind, mask_T, cu_seqlens = self.algorithm.confidence, scored.response_mask_T, scored.cu_seqlens
        if kind == "token":
            per_token = self._plus_alpha(scored.token_log_probs_T.double())
            return log_confidence(per_token, mask_T, cu_seqlens, "length_normalized")
        return self._plus_alpha(
            log_confidence(scored.token_log_probs_T, mask_T, cu_seqlens, kind, scored.group_values_S)
        )

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return p of each token + alpha, float64 [T], for `token`; None for the other confidences."""
        return (
            self._plus_alpha(scored.token_log_probs_T.double())
            if self.algorithm.confidence == "token"
            else None
        )

    def _plus_alpha(self, log_values: torch.Tensor) -> torch.Tensor:
        if self.algorithm.alpha == 0:
            return log_values.exp()
        log_alpha = torch.full_like(log_values, math.log(self.algorithm.alpha))
        return torch.logaddexp(log_values, log_alpha).exp()
