"""Combine the ranks' row statistics: one all-gather of 12 bytes per token (16 with entropy), then arithmetic
per token.

`stats_RTk` holds (top, log_sum, target[, rest_entropy]) of every tensor-parallel rank, see reference.py.
mass_r is the log of rank r's sum of exponentials and share_r = exp(mass_r - logsumexp of all masses). With
z = log of the whole rest's mass - x_target / temperature, p = sigmoid(-z) and q = sigmoid(z) = 1 - p:

    log p    = -softplus(z)
    entropy  = p softplus(z) + q softplus(-z) + q * rest_entropy,   rest_entropy = sum_r share_r (rest_entropy_r - log share_r)

All values stay accurate for p -> 1. Every rank computes equal values, because the gathered numbers are equal.

Shape suffixes: T tokens, R tensor-parallel ranks, k statistics (3, or 4 with entropy).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.reference import LARGEST_GAP, NEG_INF, join_mass, joined_rest_entropy, num_stats, softplus


class Joined(NamedTuple):
    """Per-token values that every rank computes from the gathered statistics."""

    log_probs_T: Tensor  # log p of the target; 0 for ignored tokens
    target_excluded_T: (
        Tensor  # q = 1 - p, the derivative of log p with respect to the target's tempered logit
    )
    shares_RT: Tensor  # each rank's fraction of the mass outside the target
    entropy_T: Tensor | None


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of `group`, 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in `group`, 0 for None."""
    return 0 if group is None else group.rank()


def check_shard(vocab_start: int, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError if a rank other than the first starts at vocabulary column 0, because its mass would
    count twice."""
    rank = group_rank(group)
    if rank > 0 and vocab_start == 0:
        raise ValueError(
            f"vocab_start: expected this rank's first column, got 0 on rank {rank} of {group_size(group)}; "
            "logits that hold the "
            "whole vocabulary on every rank need group=None"
        )


class GatheredStats:
    """An asynchronous all-gather of statistics; `wait()` returns stats_RTk. Makes no collective without a
    group of several ranks."""

    def __init__(self, stats_Tk: Tensor, group: dist.ProcessGroup | None) -> None:
        self._stats_RTk = stats_Tk[None]
        self._work = None
        if group is not None and group.size() > 1:
            self._stats_RTk = stats_Tk.new_empty(group.size(), *stats_Tk.shape)
            flat = self._stats_RTk.view(-1, stats_Tk.shape[1])
            self._work = dist.all_gather_into_tensor(flat, stats_Tk.contiguous(), group=group, async_op=True)

    def wait(self) -> Tensor:
        """Wait for the all-gather and return the statistics of all ranks, [R, T, k]."""
        if self._work is not None:
            self._work.wait()
        return self._stats_RTk


def join(stats_RTk: Tensor, inv_temperature: float, backend: str = "auto") -> Joined:
    """Compute log p, 1 - p, the ranks' shares and, if the statistics include it, the entropy from the
    gathered statistics."""
    log_probs_T, target_excluded_T, shares_RT = torch.ops.rlsc.join_stats(stats_RTk, inv_temperature, backend)
    entropy_T = entropy_of(stats_RTk, inv_temperature) if stats_RTk.shape[2] == num_stats(True) else None
    return Joined(log_probs_T, target_excluded_T, shares_RT, entropy_T)


class Scores(NamedTuple):
    """Statistics of rows from all ranks, and the log p and entropy computed from them."""

    stats_RTk: Tensor
    log_probs_T: Tensor
    entropy_T: Tensor | None


class PendingScores(NamedTuple):
    """Scores whose all-gather may still run. log p is already available if one rank holds the whole
    vocabulary."""

    gathered: GatheredStats
    log_probs_T: Tensor | None
    inv_temperature: float
    backend: str

    def wait(self) -> Scores:
        """Wait for every rank's statistics and return the scores."""
        stats_RTk = self.gathered.wait()
        if self.log_probs_T is None:
            joined = join(stats_RTk, self.inv_temperature, self.backend)
            return Scores(stats_RTk, joined.log_probs_T, joined.entropy_T)
        with_entropy = stats_RTk.shape[2] == num_stats(True)
        return Scores(
            stats_RTk, self.log_probs_T, entropy_of(stats_RTk, self.inv_temperature) if with_entropy else None
        )


def score(arguments: tuple[Any, ...], group: dist.ProcessGroup | None) -> PendingScores:
    """Reduce rows of logits and start to all-gather their statistics over `group`. `arguments` are those of
    rlsc::log_prob_stats."""
    inv_temperature, backend = arguments[2], arguments[-1]
    if group_size(group) > 1:
        return PendingScores(
            GatheredStats(torch.ops.rlsc.log_prob_stats(*arguments), group), None, inv_temperature, backend
        )
    stats, log_probs_T = torch.ops.rlsc.scored_stats(*arguments)
    return PendingScores(GatheredStats(stats, None), log_probs_T, inv_temperature, backend)


def join_backward(
    stats_RTk: Tensor,
    rank: int,
    inv_temperature: float,
    grad_log_probs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """Return the gradient [T, k] of log p and entropy with respect to the statistics of `rank`."""
    return torch.ops.rlsc.join_backward(
        stats_RTk, rank, inv_temperature, grad_log_probs_T, grad_entropy_T, backend
    )


def entropy_of(stats_RTk: Tensor, inv_temperature: float) -> Tensor:
    """Return the entropy [T] of each token's whole distribution; the statistics must include the entropy of
    the rest."""
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    log_shares_RT = torch.where(mass_RT == NEG_INF, NEG_INF, mass_RT - total_T)
    near_T = gap_T.clamp(-LARGEST_GAP, LARGEST_GAP)
    p_T, q_T = torch.sigmoid(-near_T), torch.sigmoid(near_T)
    entropy_T = p_T * softplus(near_T) + q_T * (
        softplus(-near_T) + joined_rest_entropy(stats_RTk, log_shares_RT)
    )
    return torch.where(gap_T == NEG_INF, 0.0, entropy_T)
