"""Split the live tokens of packed sequences into pieces for the head, on the host, from token counts.

Shape suffixes: T packed tokens, S sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cuda": 5 << 28, "cpu": 256 << 20}  # of logits in memory at once
FEWEST_TOKENS = 64  # with fewer rows the product's cost outweighs the saved memory


class Piece(NamedTuple):
    """Rows [start, stop) of the live tokens."""

    start: int
    stop: int


class SequenceChunk(NamedTuple):
    """Whole sequences [first, last) and the pieces of their live tokens. There is one piece, or several if
    one sequence is longer than a chunk."""

    sequences: slice
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> slice:
        return slice(self.pieces[0].start, self.pieces[-1].stop)


def default_chunk_tokens(device: torch.device, num_columns: int, bytes_per_logit: int) -> int:
    """Return how many rows of `num_columns` logits fit the workspace of a device; `bytes_per_logit` counts
    all buffers."""
    workspace = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
    return max(workspace // (num_columns * bytes_per_logit), FEWEST_TOKENS)


def pieces_of(start: int, stop: int, chunk_tokens: int) -> tuple[Piece, ...]:
    """Split [start, stop) into equal pieces of at most `chunk_tokens` rows. Equal sizes avoid a small last
    product."""
    count = -(-(stop - start) // chunk_tokens)
    size = -(-(stop - start) // max(count, 1))
    return tuple(Piece(at, min(at + size, stop)) for at in range(start, stop, max(size, 1)))


def sequence_chunks(live_counts: Sequence[int], chunk_tokens: int) -> list[SequenceChunk]:
    """Group whole sequences, in order, into chunks of at most `chunk_tokens` live tokens. A longer sequence
    forms its own chunk of several pieces."""
    chunks: list[SequenceChunk] = []
    first, start, stop = 0, 0, 0
    for index, count in enumerate(live_counts):
        if stop > start and stop - start + count > chunk_tokens:
            chunks.append(SequenceChunk(slice(first, index), pieces_of(start, stop, chunk_tokens)))
            first, start = index, stop
        stop += count
    if stop > start:
        chunks.append(SequenceChunk(slice(first, len(live_counts)), pieces_of(start, stop, chunk_tokens)))
    return chunks


def longest(pieces: Sequence[Piece]) -> int:
    """Return the number of rows of the longest piece; 0 without pieces."""
    return max((piece.stop - piece.start for piece in pieces), default=0)


class LiveTokens(NamedTuple):
    """Positions of the live tokens, which are the only ones that pass through the head."""

    positions: Tensor  # int64 [num_live], increasing
    counts: tuple[int, ...]  # per sequence, on the host


def live_offsets(mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return cu_seqlens counted in live tokens: int32 [S + 1], on the device."""
    running = torch.cat([mask_T.new_zeros(1, dtype=torch.int32), mask_T.cumsum(0, dtype=torch.int32)])
    return running[cu_seqlens.long()]


def live_tokens(mask_T: Tensor, cu_seqlens: Tensor | None, live_counts: Sequence[int] | None) -> LiveTokens:
    """Locate the tokens of the mask. Makes one device-to-host copy, or none if `live_counts` is given.

    Without `cu_seqlens` all tokens count as one sequence.
    """
    if live_counts is None:
        counts_S = mask_T.sum()[None] if cu_seqlens is None else live_offsets(mask_T, cu_seqlens).diff()
        live_counts = counts_S.tolist()
    counts = tuple(int(count) for count in live_counts)
    # A stable sort puts the live tokens first, in order. Unlike nonzero(), it does not wait for the device to
    # report their number.
    order = torch.argsort(mask_T.logical_not().to(torch.uint8), stable=True)
    return LiveTokens(order[: sum(counts)], counts)
