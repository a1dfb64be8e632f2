"""Compute log-probabilities of target tokens from vocab-parallel logits.

Shape suffixes: T tokens (rows of logits), Vp vocabulary columns of this rank with padding, R tensor-parallel
ranks, k statistics.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.dispatch import Backend
from rlsc_mcore.ops.shard import VocabShard, check_rows, check_target_range
from rlsc_mcore.ops.vocab_parallel import Scores, check_shard, group_rank, join_backward, score


class _Options(NamedTuple):
    """Arguments of a call except its tensors."""

    shard: VocabShard
    group: dist.ProcessGroup | None
    with_entropy: bool
    inplace_backward: bool
    backend: str


def _forward(logits_TVp: Tensor, targets_T: Tensor, options: _Options) -> Scores:
    """Reduce the rows and all-gather their statistics over the group."""
    arguments = logits_TVp, targets_T, *options.shard.as_arguments(), options.with_entropy, options.backend
    return score(arguments, options.group).wait()


class _TokenLogProbs(torch.autograd.Function):
    """Compute log p and entropy. Backward needs no collective, because every rank has the same loss."""

    @staticmethod
    def forward(
        ctx: Any, logits_TVp: Tensor, targets_T: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        scores = _forward(logits_TVp, targets_T, options)
        ctx.options = options
        ctx.save_for_backward(logits_TVp, targets_T, scores.stats_RTk)
        return scores.log_probs_T, scores.entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits_TVp, targets_T, stats_RTk = ctx.saved_tensors
        options, rank = ctx.options, group_rank(ctx.options.group)
        shard = options.shard
        grad_stats = join_backward(
            stats_RTk, rank, shard.inv_temperature, grad_log_probs_T, grad_entropy_T, options.backend
        )
        arguments = grad_stats, stats_RTk[rank], targets_T, *shard.as_arguments(), options.backend
        if not options.inplace_backward:
            return torch.ops.rlsc.dlogits(logits_TVp, *arguments), None, None
        logits_TVp = logits_TVp.detach()
        torch.ops.rlsc.dlogits_(logits_TVp, *arguments)
        return logits_TVp, None, None


@overload
def token_log_probs(
    logits_TVp: Tensor,
    target_ids_T: Tensor,
    *,
    vocab_size: int,
    temperature: float = ...,
    vocab_start: int = ...,
    group: dist.ProcessGroup | None = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def token_log_probs(
    logits_TVp: Tensor,
    target_ids_T: Tensor,
    *,
    vocab_size: int,
    temperature: float = ...,
    vocab_start: int = ...,
    group: dist.ProcessGroup | None = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def token_log_probs(
    logits_TVp: Tensor,
    target_ids_T: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log softmax(logits / temperature) at each row's target, and optionally the entropy of each row.

    logits_TVp: float32, float16 or bfloat16 [T, Vp] with contiguous rows, this rank's columns from
    `vocab_start`. Columns at or beyond `vocab_size` are padding: ignored, gradient 0. target_ids_T: int64
    [T], global ids; a negative id marks an ignored token (log p 0, gradient bitwise 0). Returns float32 [T],
    equal on every rank of `group`; with entropy a pair. Collectives over `group`: one all-gather of 12 bytes
    per token (16 with entropy) in forward, none in backward. Mutates the logits in backward if
    `inplace_backward` is set: their gradient replaces them, so they must not be used again.
    """
    check_shard(vocab_start, group)
    check_rows(logits_TVp, target_ids_T, logits_TVp.shape[0], "logits_TVp")
    check_target_range(target_ids_T, vocab_size)
    shard = VocabShard.of(logits_TVp.shape[1], vocab_size, vocab_start, temperature)
    options = _Options(shard, group, with_entropy, inplace_backward, backend)
    if logits_TVp.requires_grad and torch.is_grad_enabled():
        log_probs_T, entropy_T = _TokenLogProbs.apply(logits_TVp, target_ids_T, options)
    else:
        _, log_probs_T, entropy_T = _forward(logits_TVp, target_ids_T, options)
    return (log_probs_T, entropy_T) if with_entropy else log_probs_T
