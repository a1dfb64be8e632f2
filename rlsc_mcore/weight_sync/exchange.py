"""Exchange the weights of a hot swap between ranks in static buckets.

Two buffers alternate: the collective of one bucket fills a buffer while the other buffer is unpacked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from rlsc_mcore.ops.block_copy import BlockCopy
from rlsc_mcore.weight_sync.plan import Block, MovedWeight, SwapPlan

BUCKET_BYTES = 32 << 20  # per sending rank; two buffers of (1 + T) buckets stay allocated
ALIGNED_ELEMENTS = 8  # 16 bytes of the shortest type


@dataclass(frozen=True)
class _Piece:
    """Describe a block, or a part of one, and its offset in its bucket."""

    weight: MovedWeight
    block: Block
    offset: int  # elements

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.weight.source.shape)
        shape[self.weight.axis] = self.block.length
        return tuple(shape)


@dataclass(frozen=True)
class _Bucket:
    """Hold the copies and transfers of one bucket; bound to one of the two buffers."""

    pack: BlockCopy
    unpack: BlockCopy
    num_elements: int  # elements of the bucket's largest part, over the ranks of the group
    sends: tuple[tuple[int, torch.Tensor], ...]  # (rank of the world, part)
    receives: tuple[tuple[int, torch.Tensor], ...]


class WeightExchange:
    """Receive the weights that this rank's engine needs from the other ranks of its model group.

    It is built once and keeps its two buffers. Without a pipeline and with engines of one rank each, every
    rank needs the whole shard of every other rank: one all-gather per bucket. Otherwise ranks need different
    parts: one batch of sends and receives per bucket. Sizes and names are not sent, because every rank
    computes them.
    """

    def __init__(
        self,
        plan: SwapPlan,
        parameters: Mapping[str, torch.Tensor],
        group: dist.ProcessGroup,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Build buckets and buffers; no collective.

        `parameters` are the engine's own tensors; the buffers are allocated on their device.
        """
        self._group, self._plan = group, plan
        self._tensors = parameters
        place = plan.place
        self._all_gather = place.engine_size == 1 and place.num_stages == 1
        self._others = [rank for rank in range(place.num_members) if rank != place.member]
        capacity = max(1, bucket_bytes // plan.dtype.itemsize)
        # streams[s][d]: the buckets that rank s sends to rank d. Every rank of the group computes the same
        # lists.
        ranks = range(place.num_members)
        wanted = _blocks_by_pair(plan.moved, place.num_members)
        streams = [[list(_buckets(wanted[s][d], capacity)) for d in ranks] for s in ranks]
        count = max(len(buckets) for row in streams for buckets in row)
        sizes = [
            max(_size(_at(buckets, number)) for row in streams for buckets in row) for number in range(count)
        ]
        outgoing, incoming = streams[place.member], [streams[s][place.member] for s in ranks]
        # Ranks that need the same blocks receive the same part of the send buffer.
        self._part_of: dict[int, int] = {}
        parts: dict[Any, int] = {}
        for rank in self._others:
            content = tuple(
                (piece.weight.engine_name, piece.block) for bucket in outgoing[rank] for piece in bucket
            )
            self._part_of[rank] = parts.setdefault(content, len(parts)) if content else 0
        num_parts = max(1, len(parts))
        # An all-gather fills one part per rank. Otherwise only ranks that send to this rank have a part.
        sources = ranks if self._all_gather else [rank for rank in self._others if incoming[rank]]
        self._slot_of = {rank: slot for slot, rank in enumerate(sources)}
        device = next(iter(parameters.values())).device
        self._send = [torch.empty(num_parts * max(sizes), dtype=plan.dtype, device=device) for _ in range(2)]
        self._receive = [
            torch.empty(max(1, len(sources)) * max(sizes), dtype=plan.dtype, device=device) for _ in range(2)
        ]
        self._buckets = [
            self._make(
                number % 2,
                size,
                {d: _at(outgoing[d], number) for d in self._others},
                {s: _at(incoming[s], number) for s in self._others},
            )
            for number, size in enumerate(sizes)
        ]

    def _make(
        self, slot: int, size: int, outgoing: dict[int, list[_Piece]], incoming: dict[int, list[_Piece]]
    ) -> _Bucket:
        """Build one bucket, whose largest part has `size` elements, on buffer `slot`."""
        # A rank that needs nothing has no part of its own and must not replace the content of another one.
        unique = {self._part_of[rank]: pieces for rank, pieces in outgoing.items() if pieces}
        packed, shards, unpacked, received = [], [], [], []
        for part, pieces in unique.items():
            for piece in pieces:
                packed.append(_view(self._send[slot][part * size :], piece))
                shards.append(
                    piece.weight.source.narrow(
                        piece.weight.axis, piece.block.source_start, piece.block.length
                    )
                )
        for rank, pieces in incoming.items():
            for piece in pieces:
                tensor = self._tensors[piece.weight.engine_name]
                unpacked.append(
                    tensor.narrow(piece.weight.axis, piece.block.target_start, piece.block.length)
                )
                received.append(_view(self._receive[slot][self._slot_of[rank] * size :], piece))
        world = dist.get_process_group_ranks(self._group)
        sends = [
            (world[rank], self._send[slot][self._part_of[rank] * size :][: _size(pieces)])
            for rank, pieces in outgoing.items()
            if pieces
        ]
        receives = [
            (world[rank], self._receive[slot][self._slot_of[rank] * size :][: _size(pieces)])
            for rank, pieces in incoming.items()
            if pieces
        ]
        return _Bucket(
            BlockCopy(packed, shards), BlockCopy(unpacked, received), size, tuple(sends), tuple(receives)
        )

    @property
    def num_buckets(self) -> int:
        """Return the number of buckets, each of which takes one collective per swap."""
        return len(self._buckets)

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of both buffers, which stay allocated."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self._send, *self._receive))

    @torch.no_grad()
    def run(self) -> None:
        """Send this rank's shards and rewrite the engine's tensors; collective over the model group."""
        pending: tuple[_Bucket, list[Any]] | None = None
        for number, bucket in enumerate(self._buckets):
            bucket.pack.run()
            works = self._start(bucket, number % 2)
            if pending is not None:
                _finish(*pending)  # overlaps with the transfer of the next bucket
            pending = bucket, works
        if pending is not None:
            _finish(*pending)

    def _start(self, bucket: _Bucket, slot: int) -> list[Any]:
        if self._all_gather:
            size = bucket.num_elements
            output = self._receive[slot][: size * self._plan.place.num_members]
            return [
                dist.all_gather_into_tensor(output, self._send[slot][:size], group=self._group, async_op=True)
            ]
        operations = [
            dist.P2POp(dist.isend, part, rank, group=self._group, tag=slot) for rank, part in bucket.sends
        ]
        operations += [
            dist.P2POp(dist.irecv, part, rank, group=self._group, tag=slot) for rank, part in bucket.receives
        ]
        return dist.batch_isend_irecv(operations) if operations else []


def _finish(bucket: _Bucket, works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
    bucket.unpack.run()


def _blocks_by_pair(
    moved: Sequence[MovedWeight], num_ranks: int
) -> list[list[list[tuple[MovedWeight, Block]]]]:
    """Group the blocks that cross ranks as [source][target], in the order of `moved`."""
    pairs: list[list[list[tuple[MovedWeight, Block]]]] = [
        [[] for _ in range(num_ranks)] for _ in range(num_ranks)
    ]
    for weight in moved:
        for target, blocks in enumerate(weight.wanted):
            for block in blocks:
                if block.source_rank != target:
                    pairs[block.source_rank][target].append((weight, block))
    return pairs


def _buckets(blocks: Sequence[tuple[MovedWeight, Block]], capacity: int) -> Iterator[list[_Piece]]:
    """Cut the blocks that one rank sends to another into buckets of at most `capacity` elements.

    A bucket with a single index of a large weight may exceed `capacity`.
    """
    pieces: list[_Piece] = []
    filled = 0
    for weight, block in blocks:
        per_index = weight.source.numel() // weight.source.shape[weight.axis]
        done = 0
        while done < block.length:
            room = (capacity - filled) // per_index
            if room <= 0 and pieces:
                yield pieces
                pieces, filled = [], 0
                continue
            length = min(block.length - done, max(room, 1))
            part = replace(
                block,
                source_start=block.source_start + done,
                target_start=block.target_start + done,
                length=length,
            )
            pieces.append(_Piece(weight, part, filled))
            filled += _aligned(length * per_index)
            done += length
    if pieces:
        yield pieces


def _at(buckets: list[list[_Piece]], number: int) -> list[_Piece]:
    return buckets[number] if number < len(buckets) else []


def _size(pieces: list[_Piece]) -> int:
    return pieces[-1].offset + _aligned(_numel(pieces[-1])) if pieces else 0


def _aligned(num_elements: int) -> int:
    """Round up to the next offset whose address vector loads can read."""
    return -(-num_elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS


def _numel(piece: _Piece) -> int:
    return piece.weight.source.numel() // piece.weight.source.shape[piece.weight.axis] * piece.block.length


def _view(part: torch.Tensor, piece: _Piece) -> torch.Tensor:
    return part[piece.offset : piece.offset + _numel(piece)].view(piece.shape)
