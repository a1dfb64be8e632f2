"""Entropy minimization: loss = sum_y sum_t H(p(.|x, y_<t)) over the tokens of the samples."""

import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule
from rlsc_mcore.types import over_tokens


class Entropy(ObjectiveRule):
    """Minimize the entropy of the tokens; every sample has weight 1."""

    trains_entropy = True


def entropy_loss(
    token_entropy_T: torch.Tensor,
    response_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    multiplicity_S: torch.Tensor,
    divisor: float,
) -> torch.Tensor:
    """Return the summed token entropy of the samples / divisor; differentiable in the entropies.

    float32 [T], bool [T], int32 [S + 1], float64 [S] -> float64 []. `divisor` is the number of samples for a
    mean and 1 for a sum.
    """
    counts_T = over_tokens(multiplicity_S, cu_seqlens, len(token_entropy_T))
    return torch.where(response_mask_T, token_entropy_T.double() * counts_T, 0.0).sum() / divisor
