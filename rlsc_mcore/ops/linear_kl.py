"""Compute the divergence of a student from a teacher over the full vocabulary, from hidden states, in chunks.

loss = sum_t w_t D_t, with D_t the forward KL(p_t || q_t) or the JSD (reference.py) of the teacher's
distribution p_t and the student's q_t. Two products give the logits of a chunk of live tokens. One kernel
reduces both rows, one overwrites the student's logits with their gradient, and two products give the
gradients of hidden states and weight: 4 products, of which the teacher has one. The logits of other chunks
are never stored.

Every rank reduces its own columns to 20 bytes per token, and one all-gather per chunk makes them those of the
whole vocabulary. The JSD needs a second sum over the vocabulary, once the normalisers are known: its 8 bytes
per token travel with the all-gather of the next chunk, so the JSD makes one all-gather more per call. The
KL's all-gather overlaps with the gradient of the chunk before.

Shape suffixes: T all tokens, N live tokens (those in the mask), C tokens of one chunk, H hidden size, Vp
vocabulary rows of this rank with padding, R tensor-parallel ranks, k statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    gather_hidden,
    has_main_grad,
    head_product,
    reduce_hidden_grad,
    saved_gradients,
)
from rlsc_mcore.ops.reference import join_kl, working_dtype
from rlsc_mcore.ops.shard import VocabShard
from rlsc_mcore.ops.vocab_parallel import GatheredStats, group_size


@dataclass(frozen=True)
class Divergence:
    """The divergence of a call: `beta` 0 is the forward KL, between 0 and 1 the JSD.

    A token whose divergence exceeds `clip` adds `clip` to the loss and has no gradient.
    """

    beta: float = 0.0
    clip: float = float("inf")


@dataclass
class _Chunk:
    """The live tokens [start, stop) between their statistics and their gradient."""

    rows: slice
    index: Tensor  # int64 [C], positions in the batch
    hidden_CH: Tensor
    student_CVp: Tensor  # logits, then their gradient
    teacher_CVp: Tensor  # logits
    norms_Ck: Tensor | None = None
    divergence_C: Tensor | None = None
    student_kl_C: Tensor | None = None  # KL(q || m)


class _Pass:
    """One pass over the chunks: computes loss, divergences and, if requested, both gradients."""

    def __init__(
        self,
        call: HeadCall,
        divergence: Divergence,
        hidden_TH: Tensor,
        teacher_NH: Tensor,
        weight_VpH: Tensor,
        teacher_weight_VpH: Tensor,
        coefficients_N: Tensor,
        live_N: Tensor,
    ) -> None:
        self.call, self.divergence, self.live_N = call, divergence, live_N
        self.hidden_TH, self.teacher_NH = hidden_TH, teacher_NH
        self.weight_VpH, self.teacher_weight_VpH = weight_VpH, teacher_weight_VpH
        dtype = working_dtype(hidden_TH.dtype)
        self.coefficients_N = coefficients_N.to(dtype)
        self.divergence_N = hidden_TH.new_zeros(live_N.shape[0], dtype=dtype)
        self.loss = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
        self.grad_hidden_TH: Tensor | None = None
        self.grad_weight: WeightGradient | None = None

    def run(self, pieces: Sequence[Piece]) -> None:
        """Process the pieces in order; with several ranks, a chunk is finished after the next has started."""
        is_sharded, is_mixed = group_size(self.call.group) > 1, self.divergence.beta > 0
        size = longest(pieces), self.weight_VpH.shape[0]
        buffers = [
            [self.hidden_TH.new_empty(size, dtype=self.call.logits_dtype) for _ in range(2)]
            for _ in range(2 if is_sharded else 1)
        ]
        previous: _Chunk | None = None
        for number, piece in enumerate([*pieces, None] if is_sharded else pieces):
            chunk = None if piece is None else self.start(piece, buffers[number % len(buffers)])
            if not is_sharded:
                assert chunk is not None
                self.join(chunk, self.reduce(chunk)[None])
                if is_mixed:
                    self.join_mixture(chunk, self.reduce_mixture(chunk)[None])
                self.finish(chunk)
                continue
            previous = self._exchange(chunk, previous, is_mixed)

    def _exchange(self, chunk: _Chunk | None, previous: _Chunk | None, is_mixed: bool) -> _Chunk | None:
        """Gather the statistics of `chunk` and, for the JSD, the sums of `previous` in one all-gather; finish
        `previous`. Either may be None: before the first chunk and after the last."""
        parts = [] if chunk is None else [self.reduce(chunk).view(-1)]
        if previous is not None and is_mixed:
            parts.append(self.reduce_mixture(previous).view(-1))
        if not parts:
            assert previous is not None
            self.finish(previous)
            return None
        gathered = GatheredStats(torch.cat(parts)[:, None], self.call.group)
        if previous is not None and not is_mixed:
            self.finish(previous)
        values_RN = gathered.wait()[:, :, 0]
        num_ranks, num_stats = values_RN.shape[0], 0
        if chunk is not None:
            num_stats = parts[0].shape[0]
            self.join(chunk, values_RN[:, :num_stats].reshape(num_ranks, -1, 5))
        if previous is not None and is_mixed:
            self.join_mixture(previous, values_RN[:, num_stats:].reshape(num_ranks, -1, 2))
            self.finish(previous)
        return chunk

    def start(self, piece: Piece, buffers: Sequence[Tensor]) -> _Chunk:
        """Compute the logits of a chunk, the student's and the teacher's."""
        rows, size = slice(piece.start, piece.stop), piece.stop - piece.start
        index = self.live_N[rows]
        hidden_CH = self.hidden_TH.index_select(0, index)
        student_CVp = head_product(hidden_CH, self.weight_VpH, buffers[0][:size])
        teacher_CVp = head_product(self.teacher_NH[rows], self.teacher_weight_VpH, buffers[1][:size])
        return _Chunk(rows, index, hidden_CH, student_CVp, teacher_CVp)

    def reduce(self, chunk: _Chunk) -> Tensor:
        """Return this rank's `kl_stats` of a chunk, [C, 5]."""
        shard = self.call.shard
        return torch.ops.rlsc.kl_stats(
            chunk.student_CVp, chunk.teacher_CVp, shard.inv_temperature, shard.num_columns, self.call.backend
        )

    def reduce_mixture(self, chunk: _Chunk) -> Tensor:
        """Return this rank's `jsd_stats` of a chunk, [C, 2]."""
        shard = self.call.shard
        return torch.ops.rlsc.jsd_stats(
            chunk.student_CVp,
            chunk.teacher_CVp,
            chunk.norms_Ck,
            shard.inv_temperature,
            shard.num_columns,
            self.divergence.beta,
            self.call.backend,
        )

    def join(self, chunk: _Chunk, stats_RCk: Tensor) -> None:
        """Set the normalisers of a chunk and its forward KL from all ranks' statistics."""
        chunk.norms_Ck, chunk.divergence_C = join_kl(stats_RCk, self.call.shard.inv_temperature)

    def join_mixture(self, chunk: _Chunk, sums_RCk: Tensor) -> None:
        """Set the JSD of a chunk from all ranks' sums."""
        student_C, teacher_C = sums_RCk.sum(dim=0).unbind(dim=1)
        chunk.student_kl_C = student_C
        chunk.divergence_C = self.divergence.beta * teacher_C + (1 - self.divergence.beta) * student_C

    def finish(self, chunk: _Chunk) -> None:
        """Add a chunk to the loss and to the gradients."""
        divergence_C, coefficients_C = chunk.divergence_C, self.coefficients_N[chunk.rows]
        assert divergence_C is not None
        self.divergence_N[chunk.rows] = divergence_C
        clip = self.divergence.clip
        self.loss += (coefficients_C.double() * divergence_C.double().clamp(max=clip)).sum()
        if self.grad_hidden_TH is None:
            return
        scale_C = torch.where(divergence_C > clip, 0.0, coefficients_C)
        shard, gradient_CVp = self.call.shard, chunk.student_CVp
        torch.ops.rlsc.kl_dlogits_(
            gradient_CVp,
            chunk.teacher_CVp,
            chunk.norms_Ck,
            scale_C,
            torch.zeros_like(scale_C) if chunk.student_kl_C is None else chunk.student_kl_C,
            shard.inv_temperature,
            shard.num_columns,
            self.divergence.beta,
            self.call.backend,
        )
        gradient_CVp = gradient_CVp.to(self.weight_VpH.dtype)
        self.grad_hidden_TH.index_copy_(0, chunk.index, gradient_CVp @ self.weight_VpH)
        if self.grad_weight is not None:
            self.grad_weight.add(gradient_CVp, chunk.hidden_CH)


class _LinearKlLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VpH: Any,
        teacher_NH: Tensor,
        teacher_weight_VpH: Tensor,
        coefficients_N: Tensor,
        live_N: Tensor,
        call: HeadCall,
        divergence: Divergence,
        pieces: Sequence[Piece],
        num_tokens: int,
        unit_upstream: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        hidden_full_TH = gather_hidden(hidden_TH, call.group, call.sequence_parallel)
        walk = _Pass(
            call,
            divergence,
            hidden_full_TH,
            teacher_NH,
            weight_VpH,
            teacher_weight_VpH,
            coefficients_N,
            live_N,
        )
        ctx.into_main_grad = unit_upstream and has_main_grad(weight_VpH)
        if any(ctx.needs_input_grad):
            walk.grad_hidden_TH = torch.zeros_like(hidden_full_TH)
        if ctx.needs_input_grad[1]:
            walk.grad_weight = WeightGradient(
                weight_VpH, weight_VpH.main_grad if ctx.into_main_grad else None
            )
        walk.run(pieces)
        grad_hidden_TH = walk.grad_hidden_TH
        if grad_hidden_TH is not None:
            grad_hidden_TH = reduce_hidden_grad(grad_hidden_TH, call.group, call.sequence_parallel)
        grad_weight_VpH = None if ctx.into_main_grad or walk.grad_weight is None else walk.grad_weight.total()
        ctx.save_for_backward(grad_hidden_TH, grad_weight_VpH)
        ctx.weight = weight_VpH  # the parameter itself, because main_grad is its attribute
        divergence_T = walk.divergence_N.new_zeros(num_tokens).index_copy_(0, live_N, walk.divergence_N)
        ctx.mark_non_differentiable(divergence_T)
        return walk.loss, divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *saved_gradients(ctx, grad_loss), *(None,) * 9


def linear_kl_loss(
    hidden_student_TH: Tensor,
    hidden_teacher_NH: Tensor,
    weight_VpH: Tensor,
    *,
    coefficients_T: Tensor,
    mask_T: Tensor,
    vocab_size: int,
    teacher_weight_VpH: Tensor | None = None,
    beta: float = 0.0,
    clip: float = float("inf"),
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    num_live: int | None = None,
    unit_upstream: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute loss = sum_t c_t min(D_t, clip) over the tokens in the mask and both gradients of the student.

    D_t is the forward KL(teacher || student) over the full vocabulary, or with 0 < `beta` < 1 the JSD
    (Agarwal et al., arXiv 2306.13649, equation 1), both at `temperature`. A token with D_t > `clip` has no
    gradient.

    hidden_student_TH: [T, H], or this rank's [T / tp, H] under `sequence_parallel`. hidden_teacher_NH:
    [N, H], one row per token in the mask, in their order, whole on every rank; no gradient. weight_VpH:
    [Vp, H], same dtype, this rank's rows from `vocab_start`; rows at or beyond `vocab_size` are padding.
    `teacher_weight_VpH`: the teacher's output weight with the same rows, default `weight_VpH`. coefficients_T
    float [T] and mask_T bool [T] hold all tokens on every rank. `chunk_tokens`: maximum number of rows of
    logits at once (default: a fixed workspace). `num_live`: number of tokens in the mask, on the host; avoids
    the only device-to-host copy. `logits_dtype`, `unit_upstream`: see linear_weighted_loss.

    Returns (loss float64 [], D_t float32 [T], detached and not clipped, 0 outside the mask), equal on every
    rank of `group`. Collectives over `group`, all in forward: one all-gather of 20 bytes per token and chunk
    (JSD: 28 bytes, and one more call); under sequence parallelism an all-gather of hidden and a
    reduce-scatter of its gradient, else an all-reduce of that gradient. Mutates `weight.main_grad` (float32)
    and `grad_added_to_main_grad` if Megatron set them on the weight. Raises ValueError if arguments do not
    match.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta: expected 0 (forward KL) or a number between 0 and 1 (JSD), got {beta}")
    if not clip > 0:
        raise ValueError(f"clip: expected more than 0, got {clip}")
    no_targets_T = torch.zeros_like(mask_T, dtype=torch.int64)
    check_head(hidden_student_TH, weight_VpH, no_targets_T, mask_T, vocab_start, group, sequence_parallel)
    if coefficients_T.shape != mask_T.shape or coefficients_T.device != mask_T.device:
        raise ValueError(
            f"coefficients_T: expected {list(mask_T.shape)} on {mask_T.device} like mask_T, got "
            f"{list(coefficients_T.shape)} on {coefficients_T.device}"
        )
    teacher_weight_VpH = weight_VpH if teacher_weight_VpH is None else teacher_weight_VpH
    live = live_tokens(mask_T, None, None if num_live is None else [num_live])
    for name, tensor, shape in (
        ("hidden_teacher_NH", hidden_teacher_NH, (live.positions.shape[0], weight_VpH.shape[1])),
        ("teacher_weight_VpH", teacher_weight_VpH, tuple(weight_VpH.shape)),
    ):
        if tensor.shape != shape or tensor.dtype != weight_VpH.dtype or tensor.device != weight_VpH.device:
            raise ValueError(
                f"{name}: expected {list(shape)} {weight_VpH.dtype} on {weight_VpH.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    dtype = check_logits_dtype(logits_dtype, hidden_student_TH.dtype)
    shard = VocabShard.of(weight_VpH.shape[0], vocab_size, vocab_start, temperature)
    if chunk_tokens is None:
        per_logit = 2 * dtype.itemsize * min(group_size(group), 2)
        chunk_tokens = default_chunk_tokens(hidden_student_TH.device, weight_VpH.shape[0], per_logit)
    return _LinearKlLoss.apply(
        hidden_student_TH,
        weight_VpH,
        hidden_teacher_NH.detach(),
        teacher_weight_VpH.detach(),
        coefficients_T.detach()[live.positions],
        live.positions,
        HeadCall(shard, group, sequence_parallel, backend, dtype),
        Divergence(beta, clip),
        pieces_of(0, live.positions.shape[0], chunk_tokens),
        mask_T.shape[0],
        unit_upstream,
    )
