"""Define the interface of an objective: sample weights, token weights, and the values that must be computed
first."""

from dataclasses import dataclass
from typing import Literal

import torch

from rlsc_mcore.algorithm.confidence import group_log_normalizer
from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.types import over_tokens

PassValue = Literal["log_prob", "entropy", "self_certainty"]


@dataclass(frozen=True)
class ScoredSequences:
    """Log-probs of packed sequences, detached. T: packed tokens, S: sequences."""

    token_log_probs_T: torch.Tensor  # float32, from the policy that sampled; offline: the starting weights
    response_mask_T: torch.Tensor  # bool, True at trained tokens
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    group_values_S: torch.Tensor | None = None  # float64, the rule's `group_values` if `needs_group`
    advantages_S: torch.Tensor | None = None  # float64, set if the objective has a reward
    current_log_probs_T: torch.Tensor | None = None  # float32, current policy; None while it is that policy
    start_log_probs_T: torch.Tensor | None = None  # float32, by the starting weights, if the rule needs them
    careless_log_probs_T: torch.Tensor | None = None  # the same behind the careless prompt of `nsd`

    @property
    def policy_log_probs_T(self) -> torch.Tensor:
        """Log-probs by the current policy, float32 [T]."""
        current_T = self.current_log_probs_T
        return self.token_log_probs_T if current_T is None else current_T

    def over_tokens(self, values_S: torch.Tensor) -> torch.Tensor:
        """Repeat the value of each sequence for its tokens: [S] -> [T]."""
        return over_tokens(values_S, self.cu_seqlens, len(self.token_log_probs_T))


@dataclass(frozen=True)
class GroupSamples:
    """All sequences of a step over all ranks, in the same order on each, scored before the pass that trains.

    Padding and sequences without trained tokens have group -1.
    """

    values_S: torch.Tensor  # float64, sum of the rule's `pass_value` over the trained tokens
    num_tokens_S: torch.Tensor  # float64, number of trained tokens
    multiplicity_S: torch.Tensor  # float64, a sequence sampled k times counts k times
    group_ids_S: torch.Tensor  # int64, question
    advantages_S: torch.Tensor  # float64, of an objective with a reward, else 0


class ObjectiveRule:
    """The rule of one objective. The base class gives every sample weight 1 (maximum likelihood of the
    samples)."""

    pass_value: PassValue = "log_prob"  # what `group_values` needs of each token, if `needs_group`
    trains_entropy = False  # True: the loss is the tokens' entropy, so there are no coefficients
    is_pairwise = False  # True: `group_values` compares answers with a reference policy, before every update

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

    def group_values(self, samples: GroupSamples) -> torch.Tensor:
        """Return `ScoredSequences.group_values_S` for rules with `needs_group`, float64 [S]: here the log of
        the sum of p(y|x) over the question's samples."""
        return group_log_normalizer(samples.values_S, samples.multiplicity_S, samples.group_ids_S)

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the weight of one sample of each sequence, float64 [S]."""
        return torch.ones(len(scored.cu_seqlens) - 1, dtype=torch.float64, device=scored.cu_seqlens.device)

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return the weight of each token, float64 [T], which replaces the weight of its sequence; None if
        all tokens of a sequence share its weight."""
        return None
