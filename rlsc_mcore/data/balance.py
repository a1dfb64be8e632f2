"""Which data-parallel rank trains which sequence: equal estimated FLOPs, few sequences moved."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

# A rank may keep so much more than the longest-first plan gives it, rather than send sequences away.
LOCALITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class CostModel:
    """FLOPs of training one sequence, forward and backward, over all tensor-parallel ranks; from the
    architecture alone."""

    per_token: float  # layers' matrix products
    per_token_pair: float  # causal attention, per pair of a token and one before it
    per_trained_token: float  # the head, which scores trained tokens only

    def flops(self, num_tokens: int, num_trained: int) -> float:
        """Estimate the FLOPs of a sequence of `num_tokens`, `num_trained` of them scored."""
        pairs = num_tokens * (num_tokens + 1) / 2
        return (
            self.per_token * num_tokens + self.per_token_pair * pairs + self.per_trained_token * num_trained
        )


def assign(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> list[int]:
    """Choose a rank for every sequence so that the largest rank's cost is small and most stay with their
    owner.

    Longest first: a sequence stays where it was sampled while that rank is below the mean, and goes to the
    least loaded rank otherwise. Where plain longest-first without owners is better by more than
    `LOCALITY_TOLERANCE`, that plan is taken. A function of its arguments alone, so that every rank computes
    the same.
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
    """Return how much longer the largest rank works than the mean: 0 is perfect, 1 is twice as long."""
    mean = sum(totals) / len(totals)
    return max(totals) / mean - 1.0 if mean > 0 else 0.0


def _longest_first(costs: Sequence[float], num_ranks: int, owners: Sequence[int] | None) -> list[int]:
    mean = sum(costs) / num_ranks
    totals = [0.0] * num_ranks
    ranks = [0] * len(costs)
    least_loaded = [
        (0.0, rank) for rank in range(num_ranks)
    ]  # a heap, with entries of loads that have grown since
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
