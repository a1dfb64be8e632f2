"""Compute the weighted loss and its gradients from hidden states in one pass: loss = -sum_t c_t log p_t.

The coefficients c_t are computed from the same log p. The logits of a chunk of whole sequences are computed
once. One kernel reads them once and overwrites them with E: the softmax over the rest, and -1 at the target
(`rest_softmax_`). A row's gradient is then complete except for its coefficient, 1 - p and the other ranks'
mass. These combine to one number per token, s_t = c_t q_t share_t / temperature with q = 1 - p, which scales
the rows of the two following products:

    d hidden = s * (E weight)        d weight += E^T (s * hidden)

Cost: 3 matrix products, one read and one write of the logits, no second pass and no host synchronization, for
any tensor-parallel size. A sequence longer than a chunk is first reduced in pieces; when its coefficients are
known, each piece is recomputed (4 products).

Shape suffixes: T all tokens, N live tokens (those in the mask), C tokens of one chunk or piece, S sequences,
H hidden size, Vp vocabulary rows of this rank with padding, R tensor-parallel ranks, k statistics, 1 a
dimension of size 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsc_mcore.ops.chunks import (
    SequenceChunk,
    default_chunk_tokens,
    live_offsets,
    live_tokens,
    longest,
    sequence_chunks,
)
from rlsc_mcore.ops.dispatch import Backend
from rlsc_mcore.ops.head import (
    HeadCall,
    WeightGradient,
    check_head,
    check_logits_dtype,
    gather_hidden,
    has_main_grad,
    head_product,
    reduce_hidden_grad,
    saved_gradients,
    score_pieces,
)
from rlsc_mcore.ops.shard import VocabShard, check_target_range
from rlsc_mcore.ops.vocab_parallel import GatheredStats, group_rank, group_size, join, join_backward

CoefficientFn = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""(token_log_probs float32 [C] detached, mask bool [C], cu_seqlens int32 [S' + 1], sequences) -> c_t, float
[C], on the device.

`sequences` selects whole sequences of the batch; C counts their live tokens, in order. The mask is therefore
True everywhere.
"""

SMALLEST_SHARE = {torch.float16: 2.0**-15}  # 1 / share is stored in the rows' dtype; 2^-100 elsewhere


class _Pass:
    """One pass over the chunks: computes the loss, log p of every token and, if requested, both gradients."""

    def __init__(
        self,
        call: HeadCall,
        hidden_TH: Tensor,
        weight_VpH: Tensor,
        targets_T: Tensor,
        live_N: Tensor,
        cu_live: Tensor,
    ) -> None:
        self.call, self.hidden_TH, self.weight_VpH, self.targets_T = call, hidden_TH, weight_VpH, targets_T
        self.live_N, self.cu_live, self.rank = live_N, cu_live, group_rank(call.group)
        self.loss = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
        self.log_probs_N = hidden_TH.new_zeros(
            live_N.shape[0], dtype=torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        )
        self.grad_hidden_TH: Tensor | None = None
        self.grad_weight: WeightGradient | None = None
        self.logits_buffer: Tensor | None = None  # used if the logits have another dtype than the operands

    def run(self, chunks: Sequence[SequenceChunk], coefficient_fn: CoefficientFn) -> None:
        """Process the chunks in order. With several ranks, one chunk's statistics are gathered while the next
        chunk's product runs."""
        num_buffers = min(group_size(self.call.group), 2)
        rows = max((longest(chunk.pieces) for chunk in chunks), default=0)
        size = rows, self.weight_VpH.shape[0]
        buffers = [self.hidden_TH.new_empty(size) for _ in range(num_buffers)]
        if self.call.logits_dtype != self.hidden_TH.dtype:
            self.logits_buffer = self.hidden_TH.new_empty(size, dtype=self.call.logits_dtype)
        unfinished: list[Callable[[], None]] = []
        for index, chunk in enumerate(chunks):
            if len(unfinished) == num_buffers:
                unfinished.pop(0)()
            in_one_piece = self.grad_hidden_TH is not None and len(chunk.pieces) == 1
            start = self.start_chunk if in_one_piece else self.start_pieces
            unfinished.append(start(chunk, buffers[index % num_buffers], coefficient_fn))
        for finish in unfinished:
            finish()

    def start_chunk(
        self, chunk: SequenceChunk, buffer: Tensor, coefficient_fn: CoefficientFn
    ) -> Callable[[], None]:
        """Compute, reduce and overwrite a chunk's logits, and start to gather its statistics; return the
        function that finishes the chunk."""
        index = self.live_N[chunk.tokens]
        hidden_CH, targets_C = self.hidden_TH.index_select(0, index), self.targets_T[index]
        rest_CVp = buffer[: index.shape[0]]
        if self.logits_buffer is None:
            stats = self.call.rest_softmax_(head_product(hidden_CH, self.weight_VpH, rest_CVp), targets_C)
        else:
            logits_CVp = head_product(hidden_CH, self.weight_VpH, self.logits_buffer[: index.shape[0]])
            stats = self.call.rest_softmax_into(logits_CVp, rest_CVp, targets_C)
        gathered = GatheredStats(stats, self.call.group)
        return partial(
            self.finish_chunk, chunk, index, hidden_CH, targets_C, rest_CVp, gathered, coefficient_fn
        )

    def finish_chunk(
        self,
        chunk: SequenceChunk,
        index: Tensor,
        hidden_CH: Tensor,
        targets_C: Tensor,
        rest_CVp: Tensor,
        gathered: GatheredStats,
        coefficient_fn: CoefficientFn,
    ) -> None:
        joined = join(gathered.wait(), self.call.shard.inv_temperature, self.call.backend)
        coefficients_C = self.weigh(chunk, joined.log_probs_T, coefficient_fn)
        share_C = joined.shares_RT[self.rank].clamp_min(SMALLEST_SHARE.get(rest_CVp.dtype, 2.0**-100))
        if group_size(self.call.group) > 1:
            self.call.set_target_(rest_CVp, targets_C, -1.0 / share_C)
        scale_C = coefficients_C * joined.target_excluded_T * share_C * self.call.shard.inv_temperature
        self.add_gradients(index, hidden_CH, rest_CVp, scale_C[:, None])

    def start_pieces(
        self, chunk: SequenceChunk, buffer: Tensor, coefficient_fn: CoefficientFn
    ) -> Callable[[], None]:
        """Return the function that runs a chunk in pieces, after the previous chunk is finished. Used for a
        chunk that does not fit one buffer or that needs no gradient."""
        return partial(self.run_pieces, chunk, buffer, coefficient_fn)

    def run_pieces(self, chunk: SequenceChunk, buffer: Tensor, coefficient_fn: CoefficientFn) -> None:
        logits_buffer = buffer if self.logits_buffer is None else self.logits_buffer
        scores = score_pieces(
            self.call,
            self.hidden_TH,
            self.weight_VpH,
            self.targets_T,
            self.live_N,
            chunk.pieces,
            logits_buffer,
        )
        stats_RCk = scores.stats_RTk
        coefficients_C = self.weigh(chunk, scores.log_probs_T, coefficient_fn)
        if self.grad_hidden_TH is None:
            return
        grad_stats_Ck = join_backward(
            stats_RCk, self.rank, self.call.shard.inv_temperature, -coefficients_C, None, self.call.backend
        )
        for start, stop in chunk.pieces:
            index, rows = (
                self.live_N[start:stop],
                slice(start - chunk.tokens.start, stop - chunk.tokens.start),
            )
            hidden_CH = self.hidden_TH.index_select(0, index)
            logits_CVp = head_product(hidden_CH, self.weight_VpH, logits_buffer[: stop - start])
            self.call.dlogits_(
                logits_CVp, grad_stats_Ck[rows], stats_RCk[self.rank, rows], self.targets_T[index]
            )
            if logits_buffer is not buffer:
                logits_CVp = buffer[: stop - start].copy_(logits_CVp)
            self.add_gradients(index, hidden_CH, logits_CVp, None)

    def weigh(self, chunk: SequenceChunk, log_probs_C: Tensor, coefficient_fn: CoefficientFn) -> Tensor:
        """Compute a chunk's coefficients [C] from its log p, and update the loss and the log-probs; no
        device-to-host copy."""
        first, last = chunk.sequences.start, chunk.sequences.stop
        cu_seqlens = self.cu_live[first : last + 1] - self.cu_live[first]
        coefficients_C = coefficient_fn(
            log_probs_C, torch.ones_like(log_probs_C, dtype=torch.bool), cu_seqlens, chunk.sequences
        ).detach()
        if coefficients_C.shape != log_probs_C.shape:
            raise ValueError(
                f"coefficient_fn: expected one coefficient per token {list(log_probs_C.shape)}, got "
                f"{list(coefficients_C.shape)}"
            )
        self.log_probs_N[chunk.tokens] = log_probs_C
        self.loss -= (coefficients_C.double() * log_probs_C.double()).sum()
        return coefficients_C.to(log_probs_C.dtype)

    def add_gradients(
        self, index: Tensor, hidden_CH: Tensor, dlogits_CVp: Tensor, scale_C1: Tensor | None
    ) -> None:
        """Add a piece's two products to the gradients; `scale_C1` is the missing factor of each row of
        dlogits."""
        assert self.grad_hidden_TH is not None
        grad_CH = dlogits_CVp @ self.weight_VpH
        if scale_C1 is not None:
            grad_CH.mul_(scale_C1)
            hidden_CH = (hidden_CH * scale_C1).to(hidden_CH.dtype)
        self.grad_hidden_TH.index_copy_(0, index, grad_CH)
        if self.grad_weight is not None:
            self.grad_weight.add(dlogits_CVp, hidden_CH)


class _LinearWeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VpH: Any,
        targets_T: Tensor,
        live_N: Tensor,
        cu_live: Tensor,
        call: HeadCall,
        chunks: Sequence[SequenceChunk],
        coefficient_fn: CoefficientFn,
        unit_upstream: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        hidden_full_TH = gather_hidden(hidden_TH, call.group, call.sequence_parallel)
        walk = _Pass(call, hidden_full_TH, weight_VpH, targets_T, live_N, cu_live)
        ctx.into_main_grad = unit_upstream and has_main_grad(weight_VpH)
        if any(ctx.needs_input_grad):
            walk.grad_hidden_TH = torch.zeros_like(hidden_full_TH)
        if ctx.needs_input_grad[1]:
            walk.grad_weight = WeightGradient(
                weight_VpH, weight_VpH.main_grad if ctx.into_main_grad else None
            )
        walk.run(chunks, coefficient_fn)
        grad_hidden_TH = walk.grad_hidden_TH
        if grad_hidden_TH is not None:
            grad_hidden_TH = reduce_hidden_grad(grad_hidden_TH, call.group, call.sequence_parallel)
        # Saved through autograd, so that backward frees them even while the loss is still referenced.
        grad_weight_VpH = None if ctx.into_main_grad or walk.grad_weight is None else walk.grad_weight.total()
        ctx.save_for_backward(grad_hidden_TH, grad_weight_VpH)
        ctx.weight = weight_VpH  # the parameter itself, because main_grad is its attribute
        log_probs_T = walk.log_probs_N.new_zeros(targets_T.shape[0]).index_copy_(0, live_N, walk.log_probs_N)
        ctx.mark_non_differentiable(log_probs_T)
        return walk.loss, log_probs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *saved_gradients(ctx, grad_loss), *(None,) * 7


def linear_weighted_loss(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    target_ids_T: Tensor,
    *,
    mask_T: Tensor,
    cu_seqlens: Tensor,
    coefficient_fn: CoefficientFn,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    live_counts: Sequence[int] | None = None,
    unit_upstream: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute loss = -sum_t c_t log p_t over the tokens in the mask, with c_t and both gradients from the
    same pass.

    hidden_TH: [T, H], or this rank's [T / tp, H] under `sequence_parallel`. weight_VpH: [Vp, H], same dtype,
    this rank's rows from `vocab_start`; rows at or beyond `vocab_size` are padding. target_ids_T int64 [T],
    mask_T bool [T] and cu_seqlens int32 [S + 1] hold all tokens on every rank.

    `coefficient_fn` (see CoefficientFn) receives whole sequences; it must not synchronize with the device.
    `chunk_tokens`: maximum number of rows of logits at once (default: a fixed workspace); a longer sequence
    is recomputed in pieces. `live_counts`: tokens in the mask per sequence, on the host; avoids the only
    device-to-host copy. `logits_dtype`: dtype of the logits, default hidden_TH's; float32 avoids the rounding
    of logits to bfloat16. `unit_upstream`: the caller promises one backward call with upstream gradient 1;
    the weight gradient is then added to `main_grad` during forward, without a [Vp, H] buffer.

    Returns (loss float64 [], token log-probs float32 [T], detached, 0 outside the mask), equal on every rank
    of `group`. Collectives over `group`, all in forward: one all-gather of 12 bytes per token and chunk;
    under sequence parallelism an all-gather of hidden and a reduce-scatter of its gradient, else an
    all-reduce of that gradient. Mutates `weight.main_grad` (float32) and `grad_added_to_main_grad` if
    Megatron set them on the weight.
    """
    check_head(hidden_TH, weight_VpH, target_ids_T, mask_T, vocab_start, group, sequence_parallel)
    check_target_range(target_ids_T, vocab_size)
    if live_counts is not None and len(live_counts) != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"live_counts: expected one count per sequence ({cu_seqlens.shape[0] - 1}), got "
            f"{len(live_counts)}"
        )
    dtype = check_logits_dtype(logits_dtype, hidden_TH.dtype)
    shard = VocabShard.of(weight_VpH.shape[0], vocab_size, vocab_start, temperature)
    live = live_tokens(mask_T, cu_seqlens, live_counts)
    if chunk_tokens is None:
        rounded = 0 if dtype == hidden_TH.dtype else dtype.itemsize
        per_logit = hidden_TH.element_size() * min(group_size(group), 2) + rounded
        chunk_tokens = default_chunk_tokens(hidden_TH.device, weight_VpH.shape[0], per_logit)
    chunks = [chunk for chunk in sequence_chunks(live.counts, chunk_tokens) if chunk.pieces]
    call = HeadCall(shard, group, sequence_parallel, backend, dtype)
    cu_live = live_offsets(mask_T, cu_seqlens)
    return _LinearWeightedLoss.apply(
        hidden_TH,
        weight_VpH,
        target_ids_T,
        live.positions,
        cu_live,
        call,
        chunks,
        coefficient_fn,
        unit_upstream,
    )
