"""Compute checksums of rows at any memory addresses. Equal bits give equal checksums, different bits differ
except for collisions, and checksums are additive over columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsc_mcore.ops.triton_rows import why_not

_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


@torch.no_grad()
def row_checksums(rows: Sequence[Tensor], first_columns: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return int64 [len(rows)]: sum over a row's elements of (bits of the element as `dtype`) * (column + 1),
    modulo 2**64.

    `rows` are one-dimensional views of stride 1, of one dtype, on one device. Row i holds columns
    `first_columns[i]`, ... of a longer row. The checksums of the parts add up to the checksum of the whole
    row, and exchanging two parts changes it. With Triton on a CUDA device all rows take one kernel launch.
    """
    if not rows:
        return torch.zeros(0, dtype=torch.int64)
    device = rows[0].device
    if why_not("row_checksums", device.type) is None and dtype in (torch.float32, torch.bfloat16):
        from rlsc_mcore.ops import triton_copy

        table = [(row.data_ptr(), row.numel(), first) for row, first in zip(rows, first_columns, strict=True)]
        return triton_copy.row_checksums(torch.tensor(table, dtype=torch.int64).to(device), rows[0], dtype)
    # All rows are concatenated, so the number of torch operations does not depend on the number of rows.
    lengths = torch.tensor([row.numel() for row in rows], device=device)
    ends = lengths.cumsum(0)
    bits = torch.cat(list(rows)).to(dtype).view(_BITS[dtype]).to(torch.int64)
    columns = torch.arange(1, len(bits) + 1, device=device)
    columns += (torch.tensor(list(first_columns), device=device) - (ends - lengths)).repeat_interleave(
        lengths
    )
    totals = torch.nn.functional.pad((bits * columns).cumsum(0), (1, 0))  # wraps like the checksums
    return totals[ends] - totals[ends - lengths]
