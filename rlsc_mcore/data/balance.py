"""Assign sequences to data-parallel ranks: balance the estimated FLOPs and move few sequences."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

# Maximum relative excess of the local plan's largest load over the longest-first plan's.
LOCALITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class CostModel:
    """FLOPs of training one sequence, forward and backward, over all tensor-parallel ranks; computed from the
    architecture."""

    per_token: float  # matrix products of the layers
    per_token_pair: float  # causal attention, per pair of a token and itself or an earlier one
    per_trained_token: float  # the head, which processes trained tokens only

    def flops(self, num_tokens: int, num_trained: int) -> float:
        """Estimate the FLOPs of a sequence of `num_tokens` tokens, of which `num_trained` are trained."""
        pairs = num_tokens * (num_tokens + 1) / 2
        return (
            self.per_token * num_tokens + self.per_token_pair * pairs + self.per_trained_token * num_trained
        )


def assign(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> list[int]:
    """Choose a rank for every sequence so that the largest load is small and most sequences stay with their
    owner.

    Sequences are assigned longest first. A sequence stays on the rank that sampled it if that rank's load
    does not exceed the mean; otherwise it goes to the least loaded rank. If longest-first without owners
    gives a largest load that is lower by more than `LOCALITY_TOLERANCE`, that plan is used instead. The
    result depends only on the arguments, so every rank computes the same plan.
    """
    if num_ranks == 1:
        return [0] * len(costs)
    local = _longest_first(costs, num_ranks, owners)
    free = _longest_first(costs, num_ranks, None)
    if max(loads(costs, local, num_ranks)) <= (1 + LOCALITY_TOLERANCE) * max(loads(costs, free, num_ranks)):
        return local
    return free


def loads(costs: Sequence[float], ranks: Sequence[int], num_ranks: int) -> list[float]:
    """Return the summed cost of each rank."""
    totals = [0.0] * num_ranks
    for cost, rank in zip(costs, ranks, strict=True):
        totals[rank] += cost
    return totals


def imbalance(totals: Sequence[float]) -> float:
    """Return max / mean - 1 of the loads: 0 is balanced, 1 means that the largest load is twice the mean."""
    mean = sum(totals) / len(totals)
    return max(totals) / mean - 1.0 if mean > 0 else 0.0


def _longest_first(costs: Sequence[float], num_ranks: int, owners: Sequence[int] | None) -> list[int]:
    mean = sum(costs) / num_ranks
    totals = [0.0] * num_ranks
    ranks = [0] * len(costs)
    least_loaded = [(0.0, rank) for rank in range(num_ranks)]  # a heap; may contain outdated loads
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        while least_loaded[0][0] != totals[least_loaded[0][1]]:
            heapq.heappop(least_loaded)
        rank = least_loaded[0][1]
        if owners is not None and totals[owners[index]] + costs[index] <= mean:
            rank = owners[index]
        ranks[index] = rank
        totals[rank] += costs[index]
        heapq.heappush(least_loaded, (totals[rank], rank))
    return ranks
