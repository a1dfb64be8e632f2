"""Sum masked values of packed sequences in a fixed order.

Shape suffixes: T packed tokens, S sequences.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsc_mcore.ops import library as _registers_the_ops  # noqa: F401
from rlsc_mcore.ops.dispatch import Backend


def per_token(values_S: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Repeat each sequence's value at its tokens: [T]; 0 after the last offset. No device-to-host copy."""
    token = torch.arange(num_tokens, device=values_S.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return torch.cat([values_S, values_S.new_zeros(1)])[sequence]


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
        ctx.dtype = values_T.dtype
        ctx.save_for_backward(mask_T, cu_seqlens)
        return torch.ops.rlsc.sequence_sums(values_T, mask_T, cu_seqlens, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mask_T, cu_seqlens = ctx.saved_tensors
        grad_T = torch.where(mask_T, per_token(grad_S, cu_seqlens, mask_T.shape[0]), 0.0)
        return grad_T.to(ctx.dtype), None, None, None


def sequence_sums(
    values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Sum the unmasked values of each packed sequence: float64 [S], accumulated in float64 in a fixed order.

    values_T: float32 or float64 [T]. mask_T: bool [T], False excludes a token. cu_seqlens: int32 [S + 1],
    non-decreasing, starting at 0; tokens after the last offset belong to no sequence. An empty or fully
    masked sequence sums to 0. Differentiable in values_T.
    """
    if values_T.dim() != 1 or values_T.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"values_T: expected float32 or float64 [T], got {values_T.dtype} {list(values_T.shape)}"
        )
    if mask_T.shape != values_T.shape or mask_T.dtype != torch.bool:
        raise ValueError(
            f"mask_T: expected bool {list(values_T.shape)}, got {mask_T.dtype} {list(mask_T.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected int32 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    for name, tensor in (("mask_T", mask_T), ("cu_seqlens", cu_seqlens)):
        if tensor.device != values_T.device:
            raise ValueError(f"{name}: expected on {values_T.device} like values_T, got {tensor.device}")
    if values_T.requires_grad and torch.is_grad_enabled():
        return _SequenceSums.apply(values_T, mask_T, cu_seqlens, backend)
    return torch.ops.rlsc.sequence_sums(values_T, mask_T, cu_seqlens, backend)
