"""Join the ranks' row statistics: one all-gather of 12 bytes per token (16 with entropy), then per-token arithmetic.

`stats_RTk` holds every tensor-parallel rank's (top, log_sum, target[, rest_entropy]) of reference.py. With mass_r the log of a
rank's sum of exponentials, share_r = exp(mass_r - logsumexp of all), z = log of the whole rest's mass - x_target / temperature,
p = sigmoid(-z) and q = sigmoid(z) = 1 - p:

    log p    = -softplus(z)
    entropy  = p softplus(z) + q softplus(-z) + q * rest_entropy,   rest_entropy = sum_r share_r (rest_entropy_r - log share_r)

All of it stays exact for p -> 1. Every rank computes the same values from the same gathered numbers.

Shape suffixes: R ranks, T tokens, k statistics.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.reference import LOG_SUM, NEG_INF, REST_ENTROPY, TARGET, join_mass, num_stats, softplus

LARGEST_GAP = 200.0  # beyond it p or 1 - p is 0 in every dtype; keeps 0 * inf out of the entropy


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
    """Raise ValueError on a rank behind the first whose columns begin at the vocabulary's start: its mass would count twice."""
    rank = group_rank(group)
    if rank > 0 and vocab_start == 0:
        raise ValueError(
            f"vocab_start: expected this rank's first column, got 0 on rank {rank} of {group_size(group)}; logits that hold the "
            "whole vocabulary on every rank need group=None"
        )


class GatheredStats:
    """An all-gather of statistics in flight: `wait()` returns stats_RTk. Without a group of several ranks nothing is sent."""

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
    """Turn the gathered statistics into log p, 1 - p, the ranks' shares and, where statistics have it, the entropy."""
    log_probs_T, target_excluded_T, shares_RT = torch.ops.rlsc.join_stats(stats_RTk, inv_temperature, backend)
    entropy_T = _entropy(stats_RTk, inv_temperature) if stats_RTk.shape[2] == num_stats(True) else None
    return Joined(log_probs_T, target_excluded_T, shares_RT, entropy_T)


def join_backward(
    stats_RTk: Tensor, rank: int, inv_temperature: float, grad_log_probs_T: Tensor | None, grad_entropy_T: Tensor | None
) -> Tensor:
    """Return the gradient [T, k] of log p and entropy with respect to the statistics of `rank`; 0 for top (see dlogits).

    The target's gradient is that of its logit wherever it lies: a rank that does not hold it has no element to write it to.
    """
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    q_T = torch.sigmoid(gap_T)
    log_shares_RT = torch.where(mass_RT == NEG_INF, NEG_INF, mass_RT - total_T)
    share_T = log_shares_RT[rank].exp()
    grad = torch.zeros_like(stats_RTk[rank])
    if grad_log_probs_T is not None:
        slope_T = grad_log_probs_T.to(grad.dtype) * q_T
        grad[:, LOG_SUM] -= slope_T * share_T
        grad[:, TARGET] += slope_T * inv_temperature
    if grad_entropy_T is not None and stats_RTk.shape[2] == num_stats(True):
        rest_entropy_T = _rest_entropy(stats_RTk, log_shares_RT)
        p_T = torch.sigmoid(-gap_T)
        toward_rest_T = p_T * (rest_entropy_T - gap_T.clamp(-LARGEST_GAP, LARGEST_GAP))
        finite_log_share_T = torch.where(share_T == 0, 0.0, log_shares_RT[rank])
        surprise_T = finite_log_share_T - stats_RTk[rank, :, REST_ENTROPY] + rest_entropy_T
        slope_T = grad_entropy_T.to(grad.dtype) * q_T
        grad[:, LOG_SUM] += slope_T * share_T * (toward_rest_T - surprise_T)
        grad[:, TARGET] -= slope_T * toward_rest_T * inv_temperature
        grad[:, REST_ENTROPY] += slope_T * share_T
    return grad


def _entropy(stats_RTk: Tensor, inv_temperature: float) -> Tensor:
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    log_shares_RT = torch.where(mass_RT == NEG_INF, NEG_INF, mass_RT - total_T)
    near_T = gap_T.clamp(-LARGEST_GAP, LARGEST_GAP)
    p_T, q_T = torch.sigmoid(-near_T), torch.sigmoid(near_T)
    entropy_T = p_T * softplus(near_T) + q_T * (softplus(-near_T) + _rest_entropy(stats_RTk, log_shares_RT))
    return torch.where(gap_T == NEG_INF, 0.0, entropy_T)


def _rest_entropy(stats_RTk: Tensor, log_shares_RT: Tensor) -> Tensor:
    shares_RT = log_shares_RT.exp()
    finite_RT = torch.where(shares_RT == 0, 0.0, log_shares_RT)
    return (shares_RT * (stats_RTk[:, :, REST_ENTROPY] - finite_RT)).sum(dim=0)
