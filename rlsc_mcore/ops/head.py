"""Run the language-model head on chunks of live tokens: gathers, matrix products, and delivery of their
gradients.

Shape suffixes: T all tokens, N live tokens (those in the mask), C tokens of one chunk or piece, H hidden
size, Vp vocabulary rows of this rank with padding, V a block of them, R tensor-parallel ranks, k statistics,
1 a dimension of size 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.chunks import Piece
from rlsc_mcore.ops.reference import working_dtype
from rlsc_mcore.ops.shard import VocabShard, check_rows
from rlsc_mcore.ops.vocab_parallel import PendingScores, Scores, check_shard, group_size, score


@dataclass(frozen=True)
class HeadCall:
    """Arguments that are fixed over the chunks of one fused-head call, and the row ops with these
    arguments."""

    shard: VocabShard
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    backend: str
    logits_dtype: torch.dtype
    with_entropy: bool = False

    def score(self, logits_CVp: Tensor, targets_C: Tensor) -> PendingScores:
        arguments = logits_CVp, targets_C, *self.shard.as_arguments(), self.with_entropy, self.backend
        return score(arguments, self.group)

    def dlogits_(
        self, logits_CVp: Tensor, grad_stats_Ck: Tensor, stats_Ck: Tensor, targets_C: Tensor
    ) -> None:
        torch.ops.rlsc.dlogits_(
            logits_CVp, grad_stats_Ck, stats_Ck, targets_C, *self.shard.as_arguments(), self.backend
        )

    def rest_softmax_into(self, logits_CVp: Tensor, out_CVp: Tensor, targets_C: Tensor) -> Tensor:
        return torch.ops.rlsc.rest_softmax_into(
            logits_CVp, out_CVp, targets_C, *self.shard.as_arguments(), self.backend
        )

    def rest_softmax_(self, logits_CVp: Tensor, targets_C: Tensor) -> Tensor:
        return torch.ops.rlsc.rest_softmax_(logits_CVp, targets_C, *self.shard.as_arguments(), self.backend)

    def set_target_(self, rows_CVp: Tensor, targets_C: Tensor, values_C: Tensor) -> None:
        """Overwrite the target's element of each row if this rank holds it."""
        column_C = targets_C - self.shard.start
        owned_C = (targets_C >= 0) & (column_C >= 0) & (column_C < self.shard.num_columns)
        column_C1 = torch.where(owned_C, column_C, 0)[:, None]
        current_C1 = rows_CVp.gather(1, column_C1)
        rows_CVp.scatter_(
            1, column_C1, torch.where(owned_C[:, None], values_C[:, None].to(rows_CVp.dtype), current_C1)
        )


COLUMNS_AT_ONCE = 8192  # rows of the weight that a CPU converts to another dtype at once


def head_product(hidden_CH: Tensor, weight_VpH: Tensor, logits_CVp: Tensor) -> Tensor:
    """Write hidden weight^T to `logits_CVp` and return it.

    If the logits have a wider dtype than the operands, products are summed and stored in the logits' dtype
    without rounding to the operands'. A CPU has no such product; there the operands are converted first, the
    weight in blocks.
    """
    if logits_CVp.dtype == hidden_CH.dtype:
        return torch.mm(hidden_CH, weight_VpH.t(), out=logits_CVp)
    if hidden_CH.device.type != "cpu":
        return torch.mm(hidden_CH, weight_VpH.t(), out_dtype=logits_CVp.dtype, out=logits_CVp)
    hidden_CH = hidden_CH.to(logits_CVp.dtype)
    for columns_CV, rows_VH in zip(
        logits_CVp.split(COLUMNS_AT_ONCE, 1), weight_VpH.split(COLUMNS_AT_ONCE), strict=True
    ):
        columns_CV.copy_(torch.mm(hidden_CH, rows_VH.to(logits_CVp.dtype).t()))
    return logits_CVp


def check_logits_dtype(logits_dtype: torch.dtype | None, operands: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits, default the operands'; ValueError if it is neither that nor float32."""
    if logits_dtype is None or logits_dtype == operands or operands == torch.float64:
        return operands
    if logits_dtype != torch.float32:
        raise ValueError(f"logits_dtype: expected {operands} like hidden_TH, or float32, got {logits_dtype}")
    return logits_dtype


def score_pieces(
    call: HeadCall,
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    targets_T: Tensor,
    live_N: Tensor,
    pieces: Sequence[Piece],
    buffer: Tensor,
) -> Scores:
    """Score live tokens piece by piece in one buffer of logits.

    One piece's statistics are gathered while the next piece's product runs.
    """
    pending = []
    for start, stop in pieces:
        index = live_N[start:stop]
        logits_CVp = head_product(hidden_TH.index_select(0, index), weight_VpH, buffer[: stop - start])
        pending.append(call.score(logits_CVp, targets_T[index]))
    scores = [piece.wait() for piece in pending]
    if len(scores) == 1:
        return scores[0]
    entropies = [piece.entropy_T for piece in scores if piece.entropy_T is not None]
    return Scores(
        torch.cat([piece.stats_RTk for piece in scores], dim=1),
        torch.cat([piece.log_probs_T for piece in scores]),
        torch.cat(entropies) if entropies else None,
    )


def check_head(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    target_ids_T: Tensor,
    mask_T: Tensor,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> None:
    """Raise ValueError if the arguments of a fused head do not match."""
    check_shard(vocab_start, group)
    num_tokens = target_ids_T.shape[0]
    ranks = group_size(group) if sequence_parallel else 1
    check_rows(hidden_TH, target_ids_T, num_tokens, "hidden_TH")
    check_rows(weight_VpH, target_ids_T, num_tokens, "weight_VpH")
    if num_tokens % ranks or hidden_TH.shape[0] != num_tokens // ranks:
        expected = (
            f"{num_tokens} / {ranks} rows under sequence parallelism" if ranks > 1 else f"{num_tokens} rows"
        )
        raise ValueError(f"hidden_TH: expected {expected} like target_ids_T, got {hidden_TH.shape[0]}")
    if hidden_TH.shape[1] != weight_VpH.shape[1] or hidden_TH.dtype != weight_VpH.dtype:
        raise ValueError(
            f"hidden_TH, weight_VpH: expected the same hidden size and dtype, got {list(hidden_TH.shape)} "
            f"{hidden_TH.dtype} "
            f"and {list(weight_VpH.shape)} {weight_VpH.dtype}"
        )
    if mask_T.shape != target_ids_T.shape or mask_T.dtype != torch.bool:
        raise ValueError(f"mask_T: expected bool [{num_tokens}], got {mask_T.dtype} {list(mask_T.shape)}")
    for name, tensor in (("weight_VpH", weight_VpH), ("mask_T", mask_T)):
        if tensor.device != hidden_TH.device:
            raise ValueError(f"{name}: expected on {hidden_TH.device} like hidden_TH, got {tensor.device}")


def gather_hidden(hidden_TH: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Return the hidden states of all tokens; one all-gather over `group` under sequence parallelism."""
    if not sequence_parallel or group is None or group.size() == 1:
        return hidden_TH
    gathered = hidden_TH.new_empty(hidden_TH.shape[0] * group.size(), hidden_TH.shape[1])
    dist.all_gather_into_tensor(gathered, hidden_TH.contiguous(), group=group)
    return gathered


def reduce_hidden_grad(grad_TH: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum the ranks' partial gradients of the hidden states over `group`: reduce-scatter under sequence
    parallelism, else all-reduce."""
    if group is None or group.size() == 1:
        return grad_TH
    if not sequence_parallel:
        dist.all_reduce(grad_TH, group=group)
        return grad_TH
    scattered = grad_TH.new_empty(grad_TH.shape[0] // group.size(), grad_TH.shape[1])
    dist.reduce_scatter_tensor(scattered, grad_TH, group=group)
    return scattered


def has_main_grad(weight: Tensor) -> bool:
    """Return whether Megatron keeps this parameter's gradient in `main_grad` and reads
    `grad_added_to_main_grad`."""
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")


class WeightGradient:
    """Accumulates the chunks' weight gradients, dlogits^T hidden, in float32 in a fixed order, without
    rounding the products."""

    def __init__(self, weight_VpH: Tensor, buffer_VpH: Tensor | None = None) -> None:
        """Start at zero, or add to `buffer_VpH` (Megatron's main_grad)."""
        self._beta = (
            0.0 if buffer_VpH is None else 1.0
        )  # 0: the first product overwrites uninitialized memory
        dtype = torch.float64 if weight_VpH.dtype == torch.float64 else torch.float32
        self._sum_VpH = torch.empty_like(weight_VpH, dtype=dtype) if buffer_VpH is None else buffer_VpH

    def add(self, dlogits_CVp: Tensor, hidden_CH: Tensor) -> None:
        """Add one chunk."""
        total = self._sum_VpH
        if total.dtype == dlogits_CVp.dtype:
            total.addmm_(dlogits_CVp.t(), hidden_CH, beta=self._beta)
        elif dlogits_CVp.device.type != "cpu":
            torch.addmm(total, dlogits_CVp.t(), hidden_CH, beta=self._beta, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(dlogits_CVp.t().to(total.dtype), hidden_CH.to(total.dtype), beta=self._beta)
        self._beta = 1.0

    def total(self) -> Tensor:
        """Return the sum: float32 [Vp, H] (float64 for float64 weights)."""
        return self._sum_VpH if self._beta else self._sum_VpH.zero_()


def deliver_weight_grad(
    weight_VpH: Tensor, grad_VpH: Tensor | None, upstream: Tensor | None
) -> Tensor | None:
    """Add a weight's gradient times `upstream` to Megatron's float32 `main_grad` if it exists, else return it
    for autograd.

    `grad_VpH` None means that `main_grad` already holds the gradient. Mutates `weight.main_grad` and
    `weight.grad_added_to_main_grad`. If `main_grad` exists, the returned tensor is a placeholder that
    triggers Megatron's hook. The placeholder is zero if `zero_out_wgrad` says that the hook adds it (a weight
    tied to the embedding).
    """
    weight: Any = weight_VpH
    if upstream is not None and upstream.device.type == "cpu" and upstream.item() == 1.0:
        upstream = None
    if upstream is None and grad_VpH is not None and not has_main_grad(weight):
        return grad_VpH.to(weight.dtype)
    scale = torch.ones((), device=weight.device) if upstream is None else upstream
    if grad_VpH is not None and not has_main_grad(weight):
        return torch.mul(grad_VpH, scale.to(grad_VpH.dtype), out=torch.empty_like(weight))
    if grad_VpH is not None:
        weight.main_grad.addcmul_(grad_VpH, scale.to(grad_VpH.dtype))
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def saved_gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden states and weight that a forward pass saved, times the upstream
    gradient.

    `ctx` holds them as `saved_tensors` and the weight as `weight`; the inputs 0 and 1 are hidden states and
    weight. (None, None) if the loss has no gradient.
    """
    grad_hidden = grad_weight = None
    if grad_loss is not None:
        grad_hidden_TH, grad_weight_VpH = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            # Shape [1] instead of []: a tensor without dimensions would be rounded to the hidden states'
            # dtype before the product.
            upstream = grad_loss.to(working_dtype(grad_hidden_TH.dtype)).reshape(1)
            grad_hidden = torch.mul(grad_hidden_TH, upstream, out=torch.empty_like(grad_hidden_TH))
        if ctx.needs_input_grad[1]:
            grad_weight = deliver_weight_grad(ctx.weight, grad_weight_VpH, grad_loss)
    return grad_hidden, grad_weight
