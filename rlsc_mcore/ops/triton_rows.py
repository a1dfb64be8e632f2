"""Launch the Triton row ops of triton_kernels.py, which is imported only here, at the first launch.

Shape suffixes: T tokens (rows of logits), Vp vocabulary columns of this rank with padding, R tensor-parallel
ranks, k statistics.
"""

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from rlsc_mcore.ops.reference import num_stats, unit_grad_stats, weighted_grad_stats

MAX_ROW = 24576  # maximum number of columns that one program keeps in registers
SMALL_ROW = 256  # maximum number of columns that row_kernel takes as one tile
WIDE_ROW = 65536  # number of columns from which stats_kernel uses more than one warp per row
STATS_UNROLL = 4
STATS_NARROW, STATS_WIDE = (
    (256, 1),
    (1024, 4),
)  # (columns per block, warps) below WIDE_ROW, and from WIDE_ROW on
DLOGITS_BLOCK, DLOGITS_WARPS = 4096, 8
KL_BLOCK, KL_WARPS = 2048, 4
SUMS_BLOCK, SUMS_WARPS, JOIN_BLOCK = 4096, 32, 256  # sums: 4 values in flight per thread


def why_not(op: str, device_type: str) -> str | None:
    """Return why Triton cannot run on a device type; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton runs on a GPU, on a CPU only in its interpreter (TRITON_INTERPRET=1)"


def _kernels() -> Any:
    from rlsc_mcore.ops import triton_kernels

    return triton_kernels


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _width(columns: int) -> int:
    return 1 << max(columns - 1, 1).bit_length()


def _launch_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
    log_probs_T: Tensor | None,
) -> Tensor:
    num_rows = logits_TVp.shape[0]
    stats = torch.empty(num_rows, num_stats(with_entropy), dtype=torch.float32, device=logits_TVp.device)
    if num_rows:
        block, warps = STATS_NARROW if num_columns < WIDE_ROW else STATS_WIDE
        block = min(block, _width(num_columns))
        _kernels().stats_kernel[(num_rows,)](
            logits_TVp, logits_TVp.stride(0), targets_T.contiguous(), stats, stats if log_probs_T is None else log_probs_T,
            inv_temperature, vocab_start, num_columns, NUM_STATS=num_stats(with_entropy), SCORED=log_probs_T is not None,
            BLOCK=block, UNROLL=STATS_UNROLL if num_columns > block else 1, num_warps=warps,
        )  # fmt: skip
    return stats


def log_prob_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> Tensor:
    """Triton `reference.log_prob_stats`."""
    return _launch_stats(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, with_entropy, None)


def scored_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Triton `reference.scored_stats`: one launch."""
    log_probs_T = torch.empty(logits_TVp.shape[0], dtype=torch.float32, device=logits_TVp.device)
    return _launch_stats(
        logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, with_entropy, log_probs_T
    ), log_probs_T


def dlogits(
    grad_stats_Tk: Tensor,
    stats_Tk: Tensor,
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    out: Tensor | None = None,
) -> Tensor:
    """Triton `reference.dlogits`; `out` may be the logits."""
    out = torch.empty_like(logits_TVp) if out is None else out
    num_rows, row_columns = logits_TVp.shape
    if num_rows and row_columns:
        block = min(DLOGITS_BLOCK, _width(row_columns))
        _kernels().dlogits_kernel[(num_rows, _blocks(row_columns, block))](
            grad_stats_Tk.contiguous(), stats_Tk.contiguous(), logits_TVp, logits_TVp.stride(0), targets_T.contiguous(), out,
            out.stride(0), inv_temperature, vocab_start, num_columns, row_columns,
            NUM_STATS=stats_Tk.shape[1], BLOCK=block, num_warps=DLOGITS_WARPS,
        )  # fmt: skip
    return out


def row_tiles(row_columns: int) -> tuple[int, int]:
    """Return the widths of row_kernel's two tiles: the largest power of two below the row's width, and the
    tile for the remaining columns."""
    if row_columns <= SMALL_ROW:
        return _width(row_columns), 0
    block = 1 << (row_columns - 1).bit_length() - 1
    return block, _width(row_columns - block)


def row_warps(width: int) -> int:
    """Return the number of warps of row_kernel: 16 columns per thread; above 16384 columns up to 24. More
    would spill for rows that are not aligned."""
    return min(max(1 << max(width // 512 - 1, 0).bit_length(), 4), 32)


def _overwrite_row(
    logits_TVp: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Launch the one-pass kernel; return log p [T] if weights are given, else statistics [T, 3]."""
    num_rows, row_columns = logits_TVp.shape
    shape = (num_rows,) if weights_T is not None else (num_rows, num_stats(False))
    out = torch.empty(shape, dtype=torch.float32, device=logits_TVp.device)
    weights = out if weights_T is None else weights_T.to(torch.float32).contiguous()
    if num_rows and row_columns:
        block, rest = row_tiles(row_columns)
        _kernels().row_kernel[(num_rows,)](
            logits_TVp, logits_TVp.stride(0), targets_T.contiguous(), weights, out, out, inv_temperature, vocab_start, num_columns,
            row_columns, WEIGHTED=weights_T is not None, BLOCK=block, REST=rest, FULL=num_columns >= block,
            num_warps=row_warps(block + rest),
        )  # fmt: skip
    return out


def rest_softmax_(
    logits_TVp: Tensor, targets_T: Tensor, inv_temperature: float, vocab_start: int, num_columns: int
) -> Tensor:
    """Triton `reference.rest_softmax_`: one pass if a program can hold the row, else two reads."""
    shard = (inv_temperature, vocab_start, num_columns)
    if 0 < logits_TVp.shape[1] <= MAX_ROW:
        return _overwrite_row(logits_TVp, targets_T, None, *shard)
    stats = log_prob_stats(logits_TVp, targets_T, *shard, False)
    dlogits(unit_grad_stats(stats, inv_temperature), stats, logits_TVp, targets_T, *shard, out=logits_TVp)
    return stats


def rest_softmax_into(
    logits_TVp: Tensor,
    out_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Triton `reference.rest_softmax_into`: overwrites the logits, then copies them."""
    stats = rest_softmax_(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns)
    out_TVp.copy_(logits_TVp)
    return stats


def log_prob_dlogits_(
    logits_TVp: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Triton `reference.log_prob_dlogits_`: one pass if a program can hold the row, else two reads."""
    shard = (inv_temperature, vocab_start, num_columns)
    if 0 < logits_TVp.shape[1] <= MAX_ROW:
        return _overwrite_row(logits_TVp, targets_T, weights_T, *shard)
    stats = log_prob_stats(logits_TVp, targets_T, *shard, False)
    log_probs_T, target_excluded_T, _ = join_stats(stats[None], inv_temperature)
    grad_stats = weighted_grad_stats(weights_T, target_excluded_T, inv_temperature)
    dlogits(grad_stats, stats, logits_TVp, targets_T, *shard, out=logits_TVp)
    return log_probs_T


def join_stats(stats_RTk: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Triton `reference.join_stats`."""
    num_ranks, num_tokens, stats_columns = stats_RTk.shape
    log_probs_T, target_excluded_T = (stats_RTk.new_empty(num_tokens) for _ in range(2))
    shares_RT = stats_RTk.new_empty(num_ranks, num_tokens)
    if num_tokens:
        _kernels().join_kernel[(_blocks(num_tokens, JOIN_BLOCK),)](
            stats_RTk.contiguous(), log_probs_T, target_excluded_T, shares_RT, num_tokens, inv_temperature,
            NUM_RANKS=num_ranks, NUM_STATS=stats_columns, BLOCK=JOIN_BLOCK,
        )  # fmt: skip
    return log_probs_T, target_excluded_T, shares_RT


def join_backward(
    stats_RTk: Tensor,
    rank: int,
    inv_temperature: float,
    grad_log_probs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
) -> Tensor:
    """Triton `reference.join_backward`."""
    num_ranks, num_tokens, stats_columns = stats_RTk.shape
    stats_RTk = stats_RTk.contiguous()
    grad_stats_Tk = torch.empty_like(stats_RTk[rank])
    has_entropy = grad_entropy_T is not None and stats_columns == num_stats(True)
    if num_tokens:
        _kernels().join_backward_kernel[(_blocks(num_tokens, JOIN_BLOCK),)](
            stats_RTk,
            stats_RTk if grad_log_probs_T is None else grad_log_probs_T.contiguous(),
            stats_RTk if grad_entropy_T is None else grad_entropy_T.contiguous(),
            grad_stats_Tk, num_tokens, rank, inv_temperature, NUM_RANKS=num_ranks, NUM_STATS=stats_columns,
            HAS_LOG_PROBS=grad_log_probs_T is not None, HAS_ENTROPY=has_entropy, BLOCK=JOIN_BLOCK,
        )  # fmt: skip
    return grad_stats_Tk


def sequence_sums(values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Triton `reference.sequence_sums`."""
    num_sequences = cu_seqlens.shape[0] - 1
    sums = torch.empty(num_sequences, dtype=torch.float64, device=values_T.device)
    if num_sequences:
        _kernels().sums_kernel[(num_sequences,)](
            values_T.contiguous(),
            mask_T.contiguous().view(torch.uint8),
            cu_seqlens.contiguous(),
            sums,
            BLOCK=SUMS_BLOCK,
            num_warps=SUMS_WARPS,
        )
    return sums


def _kl_kernels() -> Any:
    from rlsc_mcore.ops import triton_kl_kernels

    return triton_kl_kernels


def kl_stats(student_TVp: Tensor, teacher_TVp: Tensor, inv_temperature: float, num_columns: int) -> Tensor:
    """Triton `reference.kl_stats`."""
    num_rows = student_TVp.shape[0]
    stats = torch.empty(num_rows, 5, dtype=torch.float32, device=student_TVp.device)
    if num_rows:
        _kl_kernels().kl_stats_kernel[(num_rows,)](
            student_TVp, student_TVp.stride(0), teacher_TVp, teacher_TVp.stride(0), stats, inv_temperature, num_columns,
            BLOCK=min(_width(num_columns), KL_BLOCK), num_warps=KL_WARPS,
        )  # fmt: skip
    return stats


def jsd_stats(
    student_TVp: Tensor,
    teacher_TVp: Tensor,
    norms_Tk: Tensor,
    inv_temperature: float,
    num_columns: int,
    beta: float,
) -> Tensor:
    """Triton `reference.jsd_stats`."""
    num_rows = student_TVp.shape[0]
    sums = torch.empty(num_rows, 2, dtype=torch.float32, device=student_TVp.device)
    if num_rows:
        _kl_kernels().jsd_stats_kernel[(num_rows,)](
            student_TVp, student_TVp.stride(0), teacher_TVp, teacher_TVp.stride(0), norms_Tk.contiguous(), sums,
            inv_temperature, num_columns, math.log(beta), math.log1p(-beta),
            BLOCK=min(_width(num_columns), KL_BLOCK), num_warps=KL_WARPS,
        )  # fmt: skip
    return sums


def kl_dlogits_(
    student_TVp: Tensor,
    teacher_TVp: Tensor,
    norms_Tk: Tensor,
    scale_T: Tensor,
    student_kl_T: Tensor,
    inv_temperature: float,
    num_columns: int,
    beta: float,
) -> None:
    """Triton `reference.kl_dlogits_`."""
    num_rows, row_columns = student_TVp.shape
    if not num_rows or not row_columns:
        return
    block = min(_width(row_columns), KL_BLOCK)
    log_beta = math.log(beta) if beta else 0.0
    _kl_kernels().kl_dlogits_kernel[(num_rows, _blocks(row_columns, block))](
        student_TVp, student_TVp.stride(0), teacher_TVp, teacher_TVp.stride(0), norms_Tk.contiguous(),
        scale_T.to(torch.float32).contiguous(), student_kl_T.to(torch.float32).contiguous(), inv_temperature, num_columns,
        row_columns, log_beta, math.log1p(-beta), MIXED=beta > 0, BLOCK=block, num_warps=KL_WARPS,
    )  # fmt: skip
