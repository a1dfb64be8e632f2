"""Plan a hot swap: for every parameter of this rank's engine, list the source blocks on the trainer ranks.

Both sides shard the same logical tensors. Megatron's tensor-parallel rank t of T and vLLM's rank e of E each
hold intervals of the query, key and value rows, of the gate and up rows, or of the rows or columns of one
tensor. Where two intervals overlap, a block is copied. The plan is static.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight


@dataclass(frozen=True)
class Place:
    """Describe this rank's position in its model group and the engine rank (of E) of each member.

    A model group has P pipeline stages of T tensor-parallel ranks; member `stage * T + tp_rank`.
    """

    tp_rank: int
    tp_size: int
    engine_size: int
    engine_ranks: tuple[int, ...]  # [P T]
    stage: int = 0
    num_stages: int = 1

    @property
    def member(self) -> int:
        """Return this rank's index in the model group."""
        return self.stage * self.tp_size + self.tp_rank

    @property
    def num_members(self) -> int:
        """Return the number of ranks in the model group."""
        return self.num_stages * self.tp_size

    @property
    def engine_rank(self) -> int:
        """Return this rank's index in its engine."""
        return self.engine_ranks[self.member]

    @property
    def holds_engine(self) -> bool:
        """Return True if this rank's trainer shards equal its engine's: no bytes cross ranks."""
        return self.num_stages == 1 and self.tp_size == self.engine_size

    def source_stage(self, stages: Sequence[int], member: int) -> int:
        """Return the stage that supplies a weight to `member`: its own if among `stages`, else one of them.

        `stages` are the pipeline stages that hold the weight.
        """
        own = member // self.tp_size
        return own if own in stages else stages[own % len(stages)]


@dataclass(frozen=True)
class Interval:
    """Describe indices [start, stop) of a logical section, which begin at `local` in a rank's shard.

    Sections 0, 1, 2 are q, k, v; sections 0, 1 are gate and up.
    """

    section: int
    start: int
    stop: int
    local: int


@dataclass(frozen=True)
class Block:
    """Describe a copy of `length` indices along a shard's sharded dimension.

    They begin at `source_start` on member `source_rank` and at `target_start` in the engine's parameter.
    """

    source_rank: int  # place in the model group
    source_start: int
    target_start: int
    length: int


@dataclass(frozen=True)
class AliasWeight:
    """A parameter whose storage engine and trainer share; every optimizer step updates both."""

    engine_name: str
    source: torch.Tensor  # the trainer's parameter, or a view of its rows


@dataclass(frozen=True)
class CopiedWeight:
    """A parameter that the engine stores itself; each swap rewrites it from `blocks`.

    The blocks come from this rank's shard or from other ranks' shards.
    """

    engine_name: str
    source: (
        torch.Tensor
    )  # this rank's shard; on the meta device where another pipeline stage holds the weight
    axis: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class MovedWeight:
    """A parameter for which at least one rank of the model group needs bytes from another rank.

    Every rank of the group lists it, also a rank that shares or copies it locally.
    """

    engine_name: str
    source: (
        torch.Tensor
    )  # this rank's shard; on the meta device where another pipeline stage holds the weight
    axis: int
    wanted: tuple[tuple[Block, ...], ...]  # [P T]: the blocks that the engine of each member needs


@dataclass(frozen=True)
class SwapPlan:
    """The action for every engine parameter of this rank."""

    place: Place
    dtype: torch.dtype  # type of the engine's parameters
    aliases: tuple[AliasWeight, ...]
    copies: tuple[CopiedWeight, ...]
    moved: tuple[MovedWeight, ...]  # the same parameters, in the same order, on every rank of the model group


def build_plan(
    weights: Sequence[BoundWeight],
    architecture: Architecture,
    engine_shapes: Mapping[str, tuple[torch.Size, torch.dtype]],
    place: Place,
) -> SwapPlan:
    """Plan the swap for one rank; pure arithmetic, no collective.

    `weights` are those of all pipeline stages in one order (`Policy.model_weights`). `engine_shapes` maps
    every engine parameter of this rank to its shape and type. A parameter whose bytes are one contiguous
    piece of this rank's shard, in the same type, is aliased; all others are copied. Raises `ValueError`
    naming the parameter if it is missing on either side or has an unexpected shape, and if the engine's
    parameters have several types.
    """
    aliases: list[AliasWeight] = []
    copies: list[CopiedWeight] = []
    moved: list[MovedWeight] = []
    remaining = dict(engine_shapes)
    dtypes = {dtype for _, dtype in engine_shapes.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"hot swap: the engine's parameters are of several types: {', '.join(sorted(map(str, dtypes)))}"
        )
    for weight in weights:
        source = weight.parameter.detach()
        if weight.engine not in remaining:
            raise ValueError(
                f"hot swap: the engine has no parameter {weight.engine} for the trainer's {weight.name}"
            )
        shape, dtype = remaining.pop(weight.engine)
        axis = weight.tp_dim or 0
        expected = list(source.shape)
        if weight.tp_dim is not None:
            total = source.shape[axis] * place.tp_size
            expected[axis] = total // place.engine_size
            if total % place.engine_size:
                raise ValueError(
                    f"hot swap: {weight.name}: {total} rows or columns do not split over {place.engine_size} "
                    "engine ranks"
                )
        if list(shape) != expected:
            raise ValueError(
                f"hot swap: {weight.engine} is {tuple(shape)} in the engine, expected {tuple(expected)}: "
                f"{weight.name} is {tuple(source.shape)} on each of {place.tp_size} trainer ranks"
            )
        wanted = tuple(_blocks(weight, architecture, place, member) for member in range(place.num_members))
        blocks = wanted[place.member]
        in_one_piece = (
            len(blocks) == 1
            and blocks[0].source_rank == place.member
            and (axis == 0 or list(source.shape) == expected)
        )
        if in_one_piece and dtype == source.dtype:
            aliases.append(
                AliasWeight(weight.engine, source.narrow(axis, blocks[0].source_start, blocks[0].length))
            )
        else:
            copies.append(CopiedWeight(weight.engine, source, axis, blocks))
        if any(block.source_rank != rank for rank, needed in enumerate(wanted) for block in needed):
            moved.append(MovedWeight(weight.engine, source, axis, wanted))
    if remaining:
        raise ValueError(f"hot swap: the trainer has nothing for the engine's {', '.join(sorted(remaining))}")
    return SwapPlan(place, next(iter(dtypes)), tuple(aliases), tuple(copies), tuple(moved))


def _blocks(weight: BoundWeight, architecture: Architecture, place: Place, member: int) -> tuple[Block, ...]:
    """Return the blocks of one weight that the engine of `member` needs.

    They are ordered by source rank and then by position in the source.
    """
    first = (
        place.source_stage(weight.stages, member) * place.tp_size
    )  # member index of tensor-parallel rank 0 in the source stage
    if weight.tp_dim is None:
        return (Block(first + member % place.tp_size, 0, 0, weight.parameter.shape[0]),)
    total = weight.parameter.shape[weight.tp_dim] * place.tp_size
    needed = _engine_intervals(weight, architecture, total, place.engine_size, place.engine_ranks[member])
    blocks: list[Block] = []
    for tp_rank in range(place.tp_size):
        for held in _trainer_intervals(weight, architecture, total, place.tp_size, tp_rank):
            for interval in needed:
                start, stop = max(held.start, interval.start), min(held.stop, interval.stop)
                if held.section == interval.section and start < stop:
                    source_start, target_start = (
                        held.local + start - held.start,
                        interval.local + start - interval.start,
                    )
                    _append(blocks, Block(first + tp_rank, source_start, target_start, stop - start))
    return tuple(blocks)


def _append(blocks: list[Block], block: Block) -> None:
    """Append `block`, or extend the last block if `block` continues it in source and target."""
    last = blocks[-1] if blocks else None
    if (
        last is not None
        and last.source_rank == block.source_rank
        and last.source_start + last.length == block.source_start
        and last.target_start + last.length == block.target_start
    ):
        blocks[-1] = Block(last.source_rank, last.source_start, last.target_start, last.length + block.length)
    else:
        blocks.append(block)


def _sections(weight: BoundWeight, architecture: Architecture, total: int) -> tuple[int, ...]:
    """Return the sizes of the logical sections along the sharded dimension."""
    if weight.layout == "qkv":
        keys = architecture.num_kv_heads * architecture.head_dim
        return architecture.num_heads * architecture.head_dim, keys, keys
    return (total // 2, total // 2) if weight.layout == "gate_up" else (total,)


def _engine_intervals(
    weight: BoundWeight, architecture: Architecture, total: int, size: int, rank: int
) -> list[Interval]:
    """Return the intervals of vLLM's shard: its share of every section, one after another."""
    intervals, local = [], 0
    for section, rows in enumerate(_sections(weight, architecture, total)):
        share = rows // size
        intervals.append(Interval(section, rank * share, (rank + 1) * share, local))
        local += share
    return intervals


def _trainer_intervals(
    weight: BoundWeight, architecture: Architecture, total: int, size: int, rank: int
) -> Iterator[Interval]:
    """Yield the intervals of Megatron's shard: queries, key and value of each query group.

    Layouts other than qkv equal vLLM's.
    """
    if weight.layout != "qkv":
        yield from _engine_intervals(weight, architecture, total, size, rank)
        return
    head_dim = architecture.head_dim
    queries = architecture.num_heads // architecture.num_kv_heads * head_dim  # of one group
    groups = architecture.num_kv_heads // size
    for number in range(groups):
        group, local = rank * groups + number, number * (queries + 2 * head_dim)
        yield Interval(0, group * queries, (group + 1) * queries, local)
        yield Interval(1, group * head_dim, (group + 1) * head_dim, local + queries)
        yield Interval(2, group * head_dim, (group + 1) * head_dim, local + queries + head_dim)
