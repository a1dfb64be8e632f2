"""Define the interface of an objective: sample weights, token weights, and the values that must be computed
first."""

from dataclasses import dataclass

import torch

from rlsc_mcore.algorithm.confidence import group_log_normalizer
from rlsc_mcore.config import AlgorithmConfig


@dataclass(frozen=True)
class ScoredSequences:
    """Log-probs of packed sequences, detached. T: packed tokens, S: sequences."""

    token_log_probs_T: torch.Tensor  # float32, from the policy that sampled
    response_mask_T: torch.Tensor  # bool, True at trained tokens
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    log_normalizer_S: torch.Tensor | None = None  # float64, set if `needs_group`
    advantages_S: torch.Tensor | None = None  # float64, set if the objective has a reward
    current_log_probs_T: torch.Tensor | None = None  # float32, current policy; None in the first update


class ObjectiveRule:
    """The rule of one objective. The base class gives every sample weight 1 (maximum likelihood of the
    samples)."""

    trains_entropy = False  # True: the loss is the tokens' entropy, so there are no coefficients

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm

    @property
    def needs_group(self) -> bool:
        """True if a weight depends on the other samples of its question, so that all must be scored first."""
        return False

    @property
    def alpha(self) -> float:
        """The alpha in effect: 0 for objectives without one."""
        return 0.0

    def group_values(
        self, sequence_log_probs_S: torch.Tensor, multiplicity_S: torch.Tensor, group_ids_S: torch.Tensor
    ) -> torch.Tensor:
        """Return `ScoredSequences.log_normalizer_S` for rules with `needs_group`: here the log of the sum of
        p(y|x) over the question's samples.

        Inputs hold all sequences of all ranks, in the same order on each: float64 [S], float64 [S], int64 [S]
        (-1 is padding) -> float64 [S].
        """
        return group_log_normalizer(sequence_log_probs_S, multiplicity_S, group_ids_S)

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the weight of one sample of each sequence, float64 [S]."""
        return torch.ones(len(scored.cu_seqlens) - 1, dtype=torch.float64, device=scored.cu_seqlens.device)

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return the weight of each token, float64 [T], which replaces the weight of its sequence; None if
        all tokens of a sequence share its weight."""
        return None
