"""Copies of many rectangles and checksums of rows, against torch's own slicing and integer sums."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlsc_mcore.ops.block_copy import BlockCopy
from rlsc_mcore.ops.row_checksums import row_checksums
from tests.unit.ops.conftest import Placement

BLOCKS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=6,
)
# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: there the values are such that both agree.
EXACT = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def values(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.bfloat16().to(dtype) if EXACT else tensor.to(dtype)


@pytest.mark.parametrize(("source_type", "target_type"), TYPES)
def test_blocks_land_where_slicing_puts_them(
    placement: Placement, source_type: torch.dtype, target_type: torch.dtype
) -> None:
    @settings(max_examples=6 if EXACT else 20, deadline=None)
    @given(blocks=BLOCKS, seed=st.integers(0, 2**31))
    def check(blocks: list[tuple[int, int, int, int]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sources, targets, expected = [], [], []
        for rows, columns, left, above in blocks:
            source = values(
                torch.randn(rows + above + 1, columns + left + 1, generator=generator), source_type
            )
            target = torch.randn(rows + 3, columns + 2 * left, generator=generator).to(target_type)
            wanted = target.clone()
            wanted[1 : rows + 1, left : left + columns] = source[
                above : above + rows, left : left + columns
            ].to(target_type)
            sources.append(source.to(placement.device))
            targets.append(target.to(placement.device))
            expected.append(wanted)
        cut = [
            (target[1 : rows + 1, left : left + columns], source[above : above + rows, left : left + columns])
            for target, source, (rows, columns, left, above) in zip(targets, sources, blocks, strict=True)
        ]
        BlockCopy([target for target, _ in cut], [source for _, source in cut]).run()
        for target, wanted in zip(targets, expected, strict=True):
            assert torch.equal(target.cpu(), wanted)  # the rectangle arrived, and nothing around it changed

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_aligned_and_vector_blocks(placement: Placement, dtype: torch.dtype) -> None:
    """Contiguous blocks of many tiles, columns that 16-byte loads can read, biases, and blocks at odd
    addresses."""
    source = torch.randn(64, 3 * 1024, dtype=torch.float64).to(dtype).to(placement.device)
    target = torch.zeros_like(source)
    bias, shifted = source[0].clone(), torch.zeros(2 * 3 * 1024, dtype=dtype, device=placement.device)
    pairs = [
        (target[:32], source[32:]),
        (target[32:, :1536], source[:32, 1536:]),
        (target[40:41, 2048:2049], source[3:4, 5:6]),
        (shifted[1 : 1 + len(bias)], bias),
        (shifted[:0], bias[:0]),
    ]
    copy = BlockCopy([t for t, _ in pairs], [s for _, s in pairs])
    assert copy.num_bytes == 2 * dtype.itemsize * (32 * 3072 + 32 * 1536 + 1 + 3072)
    for _ in range(2):  # what a copy is bound to may change between runs
        source.add_(1.0)
        bias.mul_(-2.0)
        copy.run()
        assert torch.equal(target[:32], source[32:])
        assert torch.equal(target[32:40, :1536], source[:8, 1536:])
        assert torch.equal(shifted[1 : 1 + len(bias)], bias)
        assert target[40, 2048] == source[3, 5]
        assert not target[41:, 1536:].any()
    BlockCopy([], []).run()


def test_a_block_that_cannot_be_copied_is_named() -> None:
    a = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="2 targets, but 1 sources"):
        BlockCopy([a, a], [a])
    with pytest.raises(ValueError, match=r"block 1: expected equal shapes .* got \(4, 6\) from \(3, 6\)"):
        BlockCopy([a, a], [a, a[:3]])
    with pytest.raises(ValueError, match=r"block 1 is torch\.float32 to torch\.float64, the first"):
        BlockCopy([a, a.double()], [a, a])
    with pytest.raises(ValueError, match="block 0: the source's innermost stride is 4, expected 1"):
        BlockCopy([torch.zeros(4, 4)], [torch.zeros(4, 4).T])


def checksum_of(row: torch.Tensor, first: int) -> int:
    """Modulo 2**64 in Python's integers."""
    bits = row.view({4: torch.int32, 2: torch.int16}[row.element_size()])
    total = sum(int(value) * (first + column + 1) for column, value in enumerate(bits.tolist()))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(
    ("source_type", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_checksums_are_those_of_the_bits(
    placement: Placement, source_type: torch.dtype, dtype: torch.dtype
) -> None:
    matrix = values(torch.randn(5, 2500) * 1e30, source_type).to(placement.device)
    rows = [matrix[0], matrix[1, 3:], matrix[2, :1], matrix[3, 7:1300], matrix[4]]
    firsts = [0, 3, 0, 7, 152_000]
    found = row_checksums(rows, firsts, dtype)
    assert found.tolist() == [
        checksum_of(row.cpu().to(dtype), first) for row, first in zip(rows, firsts, strict=True)
    ]
    left, right = row_checksums([matrix[0, :1000], matrix[0, 1000:]], [0, 1000], dtype).tolist()
    assert (left + right - int(found[0])) % 2**64 == 0  # parts add up
    swapped = matrix[0].clone()
    swapped[[4, 9]] = swapped[[9, 4]]
    assert int(row_checksums([swapped], [0], dtype)) != int(found[0])
    assert row_checksums([], [], dtype).tolist() == []
