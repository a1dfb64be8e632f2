"""Define what every objective may decide: the weight of each sample, factors of its tokens, and what must be
known first."""

from dataclasses import dataclass

import torch

from rlsc_mcore.algorithm.confidence import group_log_normalizer
from rlsc_mcore.config import AlgorithmConfig


@dataclass(frozen=True)
class ScoredSequences:
    """Log-probs of packed sequences, detached. T: packed tokens, S: sequences."""

    token_log_probs_T: torch.Tensor  # float32, of the policy that sampled
    response_mask_T: torch.Tensor  # bool, True at trained tokens
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    log_normalizer_S: torch.Tensor | None = None  # float64, where `needs_group`
    advantages_S: torch.Tensor | None = None  # float64, where the objective has a reward
    current_log_probs_T: torch.Tensor | None = (
        None  # float32, of the policy as it is now; None in the first update, where they agree
    )


class ObjectiveRule:
    """One objective's rule; the base class gives every sample the weight 1 (maximum likelihood of the
    samples)."""

    trains_entropy = (
        False  # the loss is the tokens' entropy: no coefficients, the gradient passes through every logit
    )

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm

    @property
    def needs_group(self) -> bool:
        """True when a weight depends on the other samples of its question, so that all of them are scored
        first."""
        return False

    @property
    def alpha(self) -> float:
        """The alpha in effect: 0 for objectives without one."""
        return 0.0

    def group_values(
        self, sequence_log_probs_S: torch.Tensor, multiplicity_S: torch.Tensor, group_ids_S: torch.Tensor
    ) -> torch.Tensor:
        """Return what `needs_group` asks for, as `ScoredSequences.log_normalizer_S`: log of the sum of p(y|x)
        over the question's samples.

        All sequences of all ranks, in the same order on each: float64 [S], float64 [S], int64 [S] (-1 is
        padding) -> float64 [S].
        """
        return group_log_normalizer(sequence_log_probs_S, multiplicity_S, group_ids_S)

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the weight of one sample of each sequence, float64 [S]."""
        return torch.ones(len(scored.cu_seqlens) - 1, dtype=torch.float64, device=scored.cu_seqlens.device)

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return a weight of each token, float64 [T], which takes the place of its sequence's; None where all
        are equal."""
        return None
