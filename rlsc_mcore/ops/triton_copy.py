# mypy: disable-error-code=no-untyped-def
"""Triton kernels of block_copy.py and row_checksums.py. Every program reads its addresses from a table."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 8, 1024, 4  # of one tile
PROGRAMS = 132 * 16  # each program takes every PROGRAMS-th tile; enough to fill current GPUs
CHECKSUM_BLOCK, CHECKSUM_WARPS = 1024, 4

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def copy_kernel(
    table, first_tiles, num_blocks, num_tiles,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy tiles program_id, program_id + num_programs, ...; `first_tiles` [num_blocks + 1] holds the first
    tile of each block."""
    tile = tl.program_id(0).to(tl.int64)
    while tile < num_tiles:
        low = 0
        high = num_blocks
        for _ in tl.static_range(SEARCH_STEPS):  # binary search for the block of this tile
            middle = (low + high) // 2
            is_before = tl.load(first_tiles + middle) <= tile
            low = tl.where(is_before, middle, low)
            high = tl.where(is_before, high, middle)
        entry = table + low * 6
        source = tl.load(entry).to(tl.pointer_type(SOURCE))
        target = tl.load(entry + 1).to(tl.pointer_type(TARGET))
        rows = tl.load(entry + 2)
        columns = tl.load(entry + 3)
        source_stride = tl.load(entry + 4)
        target_stride = tl.load(entry + 5)
        if ALIGNED:  # hints from the host: pointers in bytes, the others in elements
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
            columns = tl.multiple_of(columns, VECTOR)
            source_stride = tl.multiple_of(source_stride, VECTOR)
            target_stride = tl.multiple_of(target_stride, VECTOR)
        within = tile - tl.load(first_tiles + low)
        tiles_per_row = (columns + COLUMNS - 1) // COLUMNS
        row = (within // tiles_per_row) * ROWS + tl.arange(0, ROWS)
        column = (within % tiles_per_row) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(source + row[:, None] * source_stride + column[None, :], mask=mask)
        tl.store(target + row[:, None] * target_stride + column[None, :], values.to(TARGET), mask=mask)
        tile += tl.num_programs(0)


@triton.jit
def checksum_kernel(
    table, sums, SOURCE: tl.constexpr, TYPE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the checksum of one row per program: sum of the elements' bits times their column, counted from
    1."""
    entry = table + tl.program_id(0) * 3
    row = tl.load(entry).to(tl.pointer_type(SOURCE))
    length = tl.load(entry + 1)
    first = tl.load(entry + 2) + 1
    total = tl.zeros([BLOCK], dtype=tl.int64)
    start = length * 0
    while start < length:
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(row + offsets, mask=offsets < length, other=0.0).to(TYPE)
        bits = values.to(BITS, bitcast=True).to(tl.int64)
        total += bits * (first + offsets)
        start += BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@dataclass(frozen=True)
class CopyTable:
    """Blocks on the device: int64 [n, 6] (see block_copy.py), and the first tile of each block, int64 [n +
    1]."""

    blocks: Tensor
    first_tiles: Tensor
    num_tiles: int


def make_table(rectangles: Sequence[tuple[int, ...]], device: torch.device) -> CopyTable:
    """Build the table for `copy_blocks`; allocates on `device`."""
    tiles = [-(-rows // ROWS) * -(-columns // COLUMNS) for _, _, rows, columns, _, _ in rectangles]
    first_tiles = [0, *itertools.accumulate(tiles)]
    blocks = torch.tensor(rectangles, dtype=torch.int64)
    return CopyTable(
        blocks.to(device), torch.tensor(first_tiles, dtype=torch.int64).to(device), first_tiles[-1]
    )


def copy_blocks(table: CopyTable, target: torch.dtype, source: torch.dtype, aligned: bool) -> None:
    """Copy the blocks of `table` from dtype `source` to dtype `target`; `aligned` promises that 16-byte loads
    are possible (block_copy.py)."""
    num_blocks = len(table.blocks)
    copy_kernel[(min(PROGRAMS, table.num_tiles),)](
        table.blocks, table.first_tiles, num_blocks, table.num_tiles,
        SOURCE=_TYPES[source], TARGET=_TYPES[target], ALIGNED=aligned, VECTOR=16 // min(target.itemsize, source.itemsize),
        SEARCH_STEPS=max(num_blocks - 1, 1).bit_length(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def row_checksums(table: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int64 [n], the checksums of the rows in `table` (int64 [n, 3]: address, length, first
    column)."""
    sums = torch.empty(len(table), dtype=torch.int64, device=table.device)
    bits = tl.int32 if dtype is torch.float32 else tl.int16
    checksum_kernel[(len(table),)](
        table,
        sums,
        SOURCE=_TYPES[row.dtype],
        TYPE=_TYPES[dtype],
        BITS=bits,
        BLOCK=CHECKSUM_BLOCK,
        num_warps=CHECKSUM_WARPS,
    )
    return sums
