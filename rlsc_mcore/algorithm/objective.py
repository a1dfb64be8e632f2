"""Compute the coefficient of -log p of every answer token from the log-probs of a pass, by the rule of
`algorithm.objective`.

All objectives either weight the same tokens or train their entropies, so they share sampling, packing,
kernels and optimizer.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences
from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.objectives import OBJECTIVES


@dataclass(frozen=True)
class WeightedObjective:
    """The objective during one step, with the values that are constant within the step."""

    algorithm: AlgorithmConfig
    num_samples: int  # rollouts, or pairs, of the step over all ranks; divisor of `reduction=mean`

    @cached_property
    def rule(self) -> ObjectiveRule:
        """The rule of `algorithm.objective`."""
        rule: ObjectiveRule = OBJECTIVES[self.algorithm.objective].load_rule()(self.algorithm)
        return rule

    def weights(
        self,
        token_log_probs_T: torch.Tensor,
        response_mask_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        group_values_S: torch.Tensor | None = None,
        advantages_S: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weight of one sample of each sequence. Token weights, if the objective has them, are
        averaged over the sequence.

        Detached float32 [T], bool [T], int32 [S + 1] -> float64 [S].
        """
        scored = ScoredSequences(token_log_probs_T, response_mask_T, cu_seqlens, group_values_S, advantages_S)
        return self.rule.sequence_weights(scored)

    def token_coefficients(
        self,
        token_log_probs_T: torch.Tensor,
        response_mask_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        multiplicity_S: torch.Tensor,
        group_values_S: torch.Tensor | None = None,
        advantages_S: torch.Tensor | None = None,
        current_log_probs_T: torch.Tensor | None = None,
        start_log_probs_T: torch.Tensor | None = None,
        careless_log_probs_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return c with loss = -sum_t c_t log p_t: weight x multiplicity (/ num_samples), 0 outside the
        response mask.

        `token_log_probs_T` come from the policy that sampled; `current_log_probs_T` come from the current
        policy (None in the first update). The last two arguments come from the starting weights (None unless
        the objective compares with them). Detached float32 [T], bool [T], int32 [S + 1], float64 [S] ->
        float32 [T]. No host synchronization.
        """
        scored = ScoredSequences(
            token_log_probs_T,
            response_mask_T,
            cu_seqlens,
            group_values_S,
            advantages_S,
            current_log_probs_T,
            start_log_probs_T,
            careless_log_probs_T,
        )
        scale_S = multiplicity_S / self.num_samples if self.algorithm.reduction == "mean" else multiplicity_S
        factor_T = self.rule.token_weights(scored)
        if factor_T is None:
            scale_S = scale_S * self.rule.sequence_weights(scored)
            factor_T = torch.ones_like(token_log_probs_T, dtype=torch.float64)
        return torch.where(response_mask_T, scored.over_tokens(scale_S) * factor_T, 0.0).float()

    @property
    def needs_group(self) -> bool:
        """True if a weight depends on the other samples of its question, so that all must be scored first."""
        return self.rule.needs_group

    @property
    def is_pairwise(self) -> bool:
        """True if weights compare the answers of a pair with a reference policy, before every update."""
        return self.rule.is_pairwise

    @property
    def is_offline(self) -> bool:
        """True if the answers come from a file: the reference policy is then the starting weights."""
        return OBJECTIVES[self.algorithm.objective].is_offline

    @property
    def trains_entropy(self) -> bool:
        """True if the loss is the tokens' entropy: it has no coefficients, and its gradient passes through
        every logit."""
        return self.rule.trains_entropy

    @property
    def distills(self) -> bool:
        """True if the loss has a divergence from a teacher, which reads every logit."""
        return OBJECTIVES[self.algorithm.objective].distills

    @property
    def alpha(self) -> float:
        """The alpha in effect: 0 for objectives without one."""
        return self.rule.alpha
