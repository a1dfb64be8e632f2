"""Sequences of a step as the rules receive them, from lists or tensors."""

from collections.abc import Sequence

import torch

from rlsc_mcore.algorithm.rule import GroupSamples

Numbers = torch.Tensor | Sequence[float]


def group_samples(
    values: Numbers,
    multiplicity: Numbers,
    groups: torch.Tensor | Sequence[int],
    advantages: Numbers | None = None,
    num_tokens: Numbers | None = None,
) -> GroupSamples:
    """Build the samples in float64; by default without advantages and with one token each."""

    def double(numbers: Numbers) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.float64)

    none = torch.zeros(len(values), dtype=torch.float64)
    return GroupSamples(
        double(values),
        none + 1 if num_tokens is None else double(num_tokens),
        double(multiplicity),
        torch.as_tensor(groups),
        none if advantages is None else double(advantages),
    )
