"""Compute token log-probabilities from hidden states, with the logits of one chunk of live tokens at a time.

Forward: one product per chunk and one read of its logits. Backward recomputes each chunk (4 products in all),
because the gradient of a token's log-probability may come from any later computation. linear_loss.py needs 3
products when the weight comes from the same pass.

Shape suffixes: T all tokens, N live tokens (those in the mask), C tokens of one chunk, H hidden size, Vp
vocabulary rows of this rank with padding, R tensor-parallel ranks, k statistics.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsc_mcore.ops.chunks import Piece, default_chunk_tokens, live_tokens, longest, pieces_of
from rlsc_mcore.ops.dispatch import Backend
from rlsc_mcore.ops.head import (
    HeadCall,
    WeightGradient,
    check_head,
    check_logits_dtype,
    deliver_weight_grad,
    gather_hidden,
    head_product,
    reduce_hidden_grad,
    score_pieces,
)
from rlsc_mcore.ops.shard import VocabShard, check_target_range
from rlsc_mcore.ops.vocab_parallel import group_rank, join_backward


class _LinearTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VpH: Tensor,
        targets_T: Tensor,
        live_N: Tensor,
        call: HeadCall,
        pieces: tuple[Piece, ...],
    ) -> tuple[Tensor, Tensor | None]:
        hidden_full_TH = gather_hidden(hidden_TH, call.group, call.sequence_parallel)
        buffer = hidden_TH.new_empty(longest(pieces), weight_VpH.shape[0], dtype=call.logits_dtype)
        scores = score_pieces(call, hidden_full_TH, weight_VpH, targets_T, live_N, pieces, buffer)
        # save_for_backward lets autograd detect that the weight was changed before backward recomputes the
        # logits.
        ctx.save_for_backward(hidden_TH, weight_VpH, targets_T, live_N, scores.stats_RTk)
        ctx.weight, ctx.call, ctx.pieces = (
            weight_VpH,
            call,
            pieces,
        )  # the parameter itself, because main_grad is its attribute
        zeros_T = scores.log_probs_T.new_zeros(targets_T.shape[0])
        log_probs_T = zeros_T.index_copy(0, live_N, scores.log_probs_T)
        return log_probs_T, None if scores.entropy_T is None else zeros_T.index_copy(
            0, live_N, scores.entropy_T
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs_T: Tensor, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, weight, targets_T, live_N, stats_RNk = ctx.saved_tensors
        call, rank = ctx.call, group_rank(ctx.call.group)
        hidden_full_TH = gather_hidden(hidden_TH, call.group, call.sequence_parallel)
        targets_N, grad_entropy_N = (
            targets_T[live_N],
            None if grad_entropy_T is None else grad_entropy_T[live_N],
        )
        grad_stats = join_backward(
            stats_RNk,
            rank,
            call.shard.inv_temperature,
            grad_log_probs_T[live_N],
            grad_entropy_N,
            call.backend,
        )
        grad_hidden_TH = torch.zeros_like(hidden_full_TH)
        grad_weight_sum = WeightGradient(weight) if ctx.needs_input_grad[1] else None
        size = longest(ctx.pieces), weight.shape[0]
        buffer = hidden_TH.new_empty(size, dtype=call.logits_dtype)
        rounded = (
            buffer if buffer.dtype == hidden_TH.dtype else hidden_TH.new_empty(size)
        )  # operand of the products
        for start, stop in ctx.pieces:
            rows = slice(start, stop)
            hidden_CH = hidden_full_TH.index_select(0, live_N[rows])
            logits = head_product(hidden_CH, weight, buffer[: stop - start])
            call.dlogits_(logits, grad_stats[rows], stats_RNk[rank, rows], targets_N[rows])
            if rounded is not buffer:
                logits = rounded[: stop - start].copy_(logits)
            grad_hidden_TH.index_copy_(0, live_N[rows], logits @ weight)
            if grad_weight_sum is not None:
                grad_weight_sum.add(logits, hidden_CH)
        grad_hidden = reduce_hidden_grad(grad_hidden_TH, call.group, call.sequence_parallel)
        grad_weight = (
            None
            if grad_weight_sum is None
            else deliver_weight_grad(ctx.weight, grad_weight_sum.total(), None)
        )
        return grad_hidden, grad_weight, None, None, None, None


def linear_token_log_probs(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    target_ids_T: Tensor,
    *,
    mask_T: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    num_live: int | None = None,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Any:
    """Compute log softmax(hidden weight^T / temperature) at the targets of the tokens in the mask, in chunks.

    hidden_TH: [T, H], or this rank's [T / tp, H] under `sequence_parallel`. weight_VpH: [Vp, H], same dtype,
    this rank's rows from `vocab_start`; rows at or beyond `vocab_size` are padding. target_ids_T: int64 [T]
    and mask_T: bool [T] hold all tokens on every rank. Returns float32 [T] (with entropy a pair), 0 outside
    the mask; those tokens are not computed. `logits_dtype`: dtype of the logits, default hidden_TH's; float32
    avoids the rounding of logits to bfloat16. `chunk_tokens`: maximum number of rows of logits at once
    (default: a fixed workspace). `num_live`: mask_T.sum() on the host; avoids one device-to-host copy.

    Collectives over `group`: one all-gather of 12 (with entropy 16) bytes per token and chunk; under sequence
    parallelism an all-gather of hidden in each direction and a reduce-scatter of its gradient, else an
    all-reduce of its gradient. Mutates in backward: `weight.main_grad` (float32) and
    `grad_added_to_main_grad` if Megatron set them on the weight.
    """
    check_head(hidden_TH, weight_VpH, target_ids_T, mask_T, vocab_start, group, sequence_parallel)
    check_target_range(target_ids_T, vocab_size)
    dtype = check_logits_dtype(logits_dtype, hidden_TH.dtype)
    shard = VocabShard.of(weight_VpH.shape[0], vocab_size, vocab_start, temperature)
    live = live_tokens(mask_T, None, None if num_live is None else (num_live,))
    if chunk_tokens is None:
        rounded = 0 if dtype == hidden_TH.dtype else hidden_TH.element_size()
        chunk_tokens = default_chunk_tokens(hidden_TH.device, weight_VpH.shape[0], dtype.itemsize + rounded)
    pieces = pieces_of(0, live.positions.shape[0], chunk_tokens) or (Piece(0, 0),)
    call = HeadCall(shard, group, sequence_parallel, backend, dtype, with_entropy)
    log_probs_T, entropy_T = _LinearTokenLogProbs.apply(
        hidden_TH, weight_VpH, target_ids_T, live.positions, call, pieces
    )
    return (log_probs_T, entropy_T) if with_entropy else log_probs_T
