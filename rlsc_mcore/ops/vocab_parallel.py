"""Join the ranks' row statistics: one all-gather of 12 bytes per token (16 with entropy), then per-token
arithmetic.

`stats_RTk` holds every tensor-parallel rank's (top, log_sum, target[, rest_entropy]) of reference.py. With
mass_r the log of a rank's sum of exponentials, share_r = exp(mass_r - logsumexp of all), z = log of the whole
rest's mass - x_target / temperature, p = sigmoid(-z) and q = sigmoid(z) = 1 - p:

    log p    = -softplus(z)
    entropy  = p softplus(z) + q softplus(-z) + q * rest_entropy,   rest_entropy = sum_r share_r (rest_entropy_r - log share_r)

All of it stays exact for p -> 1. Every rank computes the same values from the same gathered numbers.

Shape suffixes: R ranks, T tokens, k statistics.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.reference import LARGEST_GAP, NEG_INF, join_mass, joined_rest_entropy, num_stats, softplus


class Joined(NamedTuple):
    """What all ranks know of each token once the statistics are gathered."""

    log_probs_T: Tensor  # log p of the target; 0 for ignored tokens
    target_excluded_T: Tensor  # q = 1 - p, the slope of log p in the target's tempered logit
    shares_RT: Tensor  # each rank's part of the mass outside the target
    entropy_T: Tensor | None


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of `group`, 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in `group`, 0 for None."""
    return 0 if group is None else group.rank()


def check_shard(vocab_start: int, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError on a rank behind the first whose columns begin at the vocabulary's start: its mass
    would count twice."""
    rank = group_rank(group)
    if rank > 0 and vocab_start == 0:
        raise ValueError(
            f"vocab_start: expected this rank's first column, got 0 on rank {rank} of {group_size(group)}; "
            "logits that hold the "
            "whole vocabulary on every rank need group=None"
        )


class GatheredStats:
    """An all-gather of statistics in flight: `wait()` returns stats_RTk. Without a group of several ranks
    nothing is sent."""

    def __init__(self, stats_Tk: Tensor, group: dist.ProcessGroup | None) -> None:
        self._stats_RTk = stats_Tk[None]
        self._work = None
        if group is not None and group.size() > 1:
            self._stats_RTk = stats_Tk.new_empty(group.size(), *stats_Tk.shape)
            flat = self._stats_RTk.view(-1, stats_Tk.shape[1])
            self._work = dist.all_gather_into_tensor(flat, stats_Tk.contiguous(), group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the statistics of all ranks, float32 [R, T, k]."""
        if self._work is not None:
            self._work.wait()
        return self._stats_RTk


def join(stats_RTk: Tensor, inv_temperature: float, backend: str = "auto") -> Joined:
    """Turn the gathered statistics into log p, 1 - p, the ranks' shares and, where statistics have it, the
    entropy."""
    log_probs_T, target_excluded_T, shares_RT = torch.ops.rlsc.join_stats(stats_RTk, inv_temperature, backend)
    entropy_T = entropy_of(stats_RTk, inv_temperature) if stats_RTk.shape[2] == num_stats(True) else None
    return Joined(log_probs_T, target_excluded_T, shares_RT, entropy_T)


class Scores(NamedTuple):
    """All ranks' statistics of some rows, and what they give."""

    stats_RTk: Tensor
    log_probs_T: Tensor
    entropy_T: Tensor | None


class PendingScores(NamedTuple):
    """Scores whose statistics may be in flight; log p is there already where one rank has the whole
    vocabulary."""

    gathered: GatheredStats
    log_probs_T: Tensor | None
    inv_temperature: float
    backend: str

    def wait(self) -> Scores:
        """Return the scores once every rank's statistics have arrived."""
        stats_RTk = self.gathered.wait()
        if self.log_probs_T is None:
            joined = join(stats_RTk, self.inv_temperature, self.backend)
            return Scores(stats_RTk, joined.log_probs_T, joined.entropy_T)
        with_entropy = stats_RTk.shape[2] == num_stats(True)
        return Scores(
            stats_RTk, self.log_probs_T, entropy_of(stats_RTk, self.inv_temperature) if with_entropy else None
        )


def score(arguments: tuple[Any, ...], group: dist.ProcessGroup | None) -> PendingScores:
    """Reduce rows of logits and begin to gather their statistics over `group`; `arguments` are those of
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
    """Return the entropy [T] of each token's whole distribution from statistics that have the rest's
    entropy."""
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    log_shares_RT = torch.where(mass_RT == NEG_INF, NEG_INF, mass_RT - total_T)
    near_T = gap_T.clamp(-LARGEST_GAP, LARGEST_GAP)
    p_T, q_T = torch.sigmoid(-near_T), torch.sigmoid(near_T)
    entropy_T = p_T * softplus(near_T) + q_T * (
        softplus(-near_T) + joined_rest_entropy(stats_RTk, log_shares_RT)
    )
    return torch.where(gap_T == NEG_INF, 0.0, entropy_T)
