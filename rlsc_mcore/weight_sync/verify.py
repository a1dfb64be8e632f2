"""Verify a hot swap by storage addresses, checksums of sampled rows, or a comparison with the export.

The verification is independent of the swap's plan: row positions are recomputed from the Megatron and vLLM
layouts, so an error in the plan is detected.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from rlsc_mcore.config import RunError
from rlsc_mcore.model.hf_checkpoint import SafetensorsFolder
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, ReadSlice
from rlsc_mcore.ops.row_checksums import row_checksums
from rlsc_mcore.weight_sync.plan import Place

_Slice = tuple[
    int, torch.Tensor, int
]  # position in the list of checksums, row or part of it, its first column
NUM_SAMPLED_ROWS = 32  # per swap; successive swaps sample other rows and cycle through all copied tensors


class SwapMismatch(RunError):
    """The engine does not hold the trainer's weights; names tensor, rank and first differing element."""


@dataclass(frozen=True)
class SampledRow:
    """Describe one row of a Hugging Face tensor and its index in the two shards of this rank.

    An index is None if another rank holds the row.
    """

    weight: BoundWeight
    name: str  # name in the Hugging Face checkpoint
    row: int  # index in the Hugging Face tensor
    trainer_row: int | None
    engine_row: int | None


class RowSampler:
    """Choose the rows that each swap compares: equal, and in equal order, on all ranks of a model group."""

    def __init__(self, weights: Sequence[BoundWeight], architecture: Architecture, place: Place) -> None:
        tensors = [(weight, section) for weight in weights for section in range(len(weight.hf))]
        # The stride spreads the rows of one swap over the whole model: over all kinds of layers and all
        # pipeline stages.
        stride = _coprime_stride(len(tensors))
        self._tensors = [tensors[number * stride % len(tensors)] for number in range(len(tensors))]
        self._num_rows = [
            _num_rows(weight, section, architecture, place) for weight, section in self._tensors
        ]
        self._architecture, self._place = architecture, place

    def rows(self, swap_number: int) -> list[SampledRow]:
        """Return `NUM_SAMPLED_ROWS` rows; each swap continues with the next tensors."""
        generator = random.Random(swap_number)
        first = swap_number * NUM_SAMPLED_ROWS
        sampled = []
        for number in range(first, first + NUM_SAMPLED_ROWS) if self._tensors else ():
            weight, section = self._tensors[number % len(self._tensors)]
            row = int(generator.random() * self._num_rows[number % len(self._tensors)])
            trainer_row = _trainer_row(weight, section, row, self._architecture, self._place)
            engine_row = _engine_row(weight, section, row, self._architecture, self._place)
            sampled.append(SampledRow(weight, weight.hf[section], row, trainer_row, engine_row))
        return sampled


def _coprime_stride(count: int) -> int:
    """Return a stride near `count` x 0.618 that visits all `count` positions.

    The golden ratio spreads any number of visits evenly.
    """
    return next((step for step in range(int(0.618 * count), 0, -1) if math.gcd(step, count) == 1), 1)


@torch.no_grad()
def compare_checksums(
    sampled: Sequence[SampledRow],
    parameters: Mapping[str, torch.Tensor],
    place: Place,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
) -> list[SampledRow]:
    """Return the sampled rows whose checksums differ between engine and trainer on this rank.

    With equal layouts (`Place.holds_engine`) no communication is needed. Otherwise int64 checksums are
    all-reduced once over the model group. A row whose columns are sharded is compared in parts; their number
    is the larger of the two tensor-parallel sizes.
    """
    held, needed = _parts(sampled, parameters, place)
    parts = max(place.tp_size, place.engine_size)
    if place.holds_engine:
        first, second = _checksums_of(held, needed, dtype)
        return [
            sampled[needed[number][0] // parts] for number in (first != second).nonzero().flatten().tolist()
        ]
    device = next(iter(parameters.values())).device
    trainer = torch.zeros(len(sampled) * parts, dtype=torch.int64, device=device)
    engine = torch.zeros_like(trainer)
    for checksums, slices in ((trainer, held), (engine, needed)):
        positions = torch.tensor([position for position, _, _ in slices], device=device, dtype=torch.int64)
        rows, firsts = [row for _, row, _ in slices], [first for _, _, first in slices]
        if rows:
            checksums[positions] = row_checksums(rows, firsts, dtype)
    if place.num_members > 1:
        dist.all_reduce(trainer, group=group)
    mine = torch.zeros_like(trainer, dtype=torch.bool)
    mine[torch.tensor([position for position, _, _ in needed], device=device, dtype=torch.int64)] = True
    differing = ((trainer != engine) & mine).nonzero().flatten().tolist()
    return [sampled[number] for number in sorted({position // parts for position in differing})]


def compare_with_tensors(
    parameters: Mapping[str, torch.Tensor],
    weights: Sequence[BoundWeight],
    exported: Iterable[tuple[str, torch.Tensor]],
    place: Place,
    rank: int,
) -> int:
    """Compare every engine parameter of this rank with exported whole tensors; return the number compared.

    `exported` gathers, so every rank of the model group must iterate over all of it. `SwapMismatch` for the
    first differing tensor is therefore raised at the end, so that no rank leaves a gather early.
    """
    stream = iter(exported)
    found: SwapMismatch | None = None
    for weight in weights:
        tensors = dict(next(stream) for _ in weight.hf)

        def read(
            name: str, axis: int | None, start: int, stop: int, tensors: dict[str, torch.Tensor] = tensors
        ) -> torch.Tensor:
            return tensors[name] if axis is None else tensors[name].narrow(axis, start, stop - start)

        def shape(name: str, tensors: dict[str, torch.Tensor] = tensors) -> Sequence[int]:
            return tensors[name].shape

        try:
            _compare(parameters[weight.engine], weight, read, shape, place, rank, "the trainer")
        except SwapMismatch as mismatch:
            found = found or mismatch
    if found is not None:
        raise found
    return len(weights)


@torch.no_grad()
def compare_with_export(
    module: nn.Module, weights: Sequence[BoundWeight], folder: Path, place: Place, rank: int
) -> int:
    """Compare every engine parameter of this rank with an exported directory; return the number compared.

    Raises `SwapMismatch` naming tensor, rank and first differing index, or a parameter that the export lacks.
    """
    source = SafetensorsFolder(folder)
    engine = dict(module.named_parameters())
    for weight in weights:
        _compare(engine.pop(weight.engine), weight, source.read, source.shape, place, rank, str(folder))
    if engine:
        raise SwapMismatch(
            f"hot swap: the engine has parameters that are not exported: {', '.join(sorted(engine))}"
        )
    return len(weights)


def _compare(
    actual: torch.Tensor,
    weight: BoundWeight,
    read: ReadSlice,
    shape: Callable[[str], Sequence[int]],
    place: Place,
    rank: int,
    source: str,
) -> None:
    """Compare one parameter with the Hugging Face tensors in vLLM's layout.

    That layout stacks the engine rank's share of each tensor.
    """
    shares = [_engine_share(weight, name, read, shape(name), actual, place) for name in weight.hf]
    expected = torch.cat(shares).to(actual)
    compared = (
        actual[: len(expected)] if weight.is_vocabulary else actual
    )  # rows at or beyond the vocabulary are padding
    if compared.shape != expected.shape:
        raise SwapMismatch(
            f"hot swap: {weight.engine} has shape {tuple(compared.shape)} in the engine, "
            f"{tuple(expected.shape)} exported"
        )
    difference = (compared != expected).nonzero()
    if len(difference):
        index = tuple(difference[0].tolist())
        raise SwapMismatch(
            f"hot swap: rank {rank}: {weight.engine}{list(index)} is {compared[index].item()!r} in the "
            "engine, "
            f"{expected[index].item()!r} in {source} ({len(difference)} of {expected.numel()} elements "
            "differ)"
        )


def _engine_share(
    weight: BoundWeight, name: str, read: ReadSlice, shape: Sequence[int], actual: torch.Tensor, place: Place
) -> torch.Tensor:
    if weight.tp_dim is None:
        return read(name, None, 0, 0)
    size, rank, ranks = shape[weight.tp_dim], place.engine_rank, place.engine_size
    if not weight.is_vocabulary:
        return read(name, weight.tp_dim, rank * size // ranks, (rank + 1) * size // ranks)
    per_rank = actual.shape[0]
    return read(name, 0, min(rank * per_rank, size), min((rank + 1) * per_rank, size))


def _num_rows(weight: BoundWeight, section: int, architecture: Architecture, place: Place) -> int:
    """Return the number of rows of the section's Hugging Face tensor."""
    if weight.layout == "qkv":
        return (architecture.num_kv_heads if section else architecture.num_heads) * architecture.head_dim
    if weight.is_vocabulary:
        return architecture.vocab_size
    rows = weight.parameter.shape[0] * (place.tp_size if weight.tp_dim == 0 else 1)
    return rows // 2 if weight.layout == "gate_up" else rows


def _trainer_row(
    weight: BoundWeight, section: int, row: int, architecture: Architecture, place: Place
) -> int | None:
    """Return the index of a Hugging Face row in this rank's Megatron shard; None if another has it."""
    if weight.tp_dim != 0:
        return row
    if weight.layout == "qkv":
        dim, per_group = architecture.head_dim, architecture.num_heads // architecture.num_kv_heads
        head, within = divmod(row, dim)
        group, place_in_group = divmod(head, per_group) if section == 0 else (head, per_group + section - 1)
        group -= place.tp_rank * (architecture.num_kv_heads // place.tp_size)
        if not 0 <= group < architecture.num_kv_heads // place.tp_size:
            return None
        return (group * (per_group + 2) + place_in_group) * dim + within
    share = weight.parameter.shape[0] // len(weight.hf)
    local = row - place.tp_rank * share
    return section * share + local if 0 <= local < share else None


def _engine_row(
    weight: BoundWeight, section: int, row: int, architecture: Architecture, place: Place
) -> int | None:
    """Return the row's index in vLLM's shard of this rank, None if another rank holds it.

    The shard stacks the shares of q, k and v (or gate and up).
    """
    if weight.tp_dim != 0:
        return row
    sizes = [_num_rows(weight, number, architecture, place) for number in range(len(weight.hf))]
    if weight.is_vocabulary:
        sizes = [weight.parameter.shape[0] * place.tp_size]
    share = sizes[section] // place.engine_size
    local = row - place.engine_rank * share
    return sum(sizes[:section]) // place.engine_size + local if 0 <= local < share else None


def _checksums_of(
    held: Sequence[_Slice], needed: Sequence[_Slice], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the checksums of both sides; one kernel launch if they have the same type."""

    def checksums(slices: Sequence[_Slice]) -> torch.Tensor:
        return row_checksums([row for _, row, _ in slices], [first for _, _, first in slices], dtype)

    if held and needed and held[0][1].dtype == needed[0][1].dtype:
        both = checksums([*held, *needed])
        return both[: len(held)], both[len(held) :]
    return checksums(held), checksums(needed)


def _parts(
    sampled: Sequence[SampledRow], parameters: Mapping[str, torch.Tensor], place: Place
) -> tuple[list[_Slice], list[_Slice]]:
    """Return the parts of the sampled rows in the trainer's shard and in the engine's shard."""
    parts = max(place.tp_size, place.engine_size)
    held: list[_Slice] = []
    needed: list[_Slice] = []
    for number, sample in enumerate(sampled):
        # Several ranks may hold a row; the sum over the group must count it once.
        first_stage = sample.weight.stages[0]
        replicated_elsewhere = place.stage != first_stage or (
            sample.weight.tp_dim is None and place.tp_rank > 0
        )
        counted = place.holds_engine or not replicated_elsewhere
        sides = (
            (held, sample.trainer_row, sample.weight.parameter.detach(), place.tp_rank, place.tp_size),
            (
                needed,
                sample.engine_row,
                parameters[sample.weight.engine],
                place.engine_rank,
                place.engine_size,
            ),
        )
        for slices, row, tensor, rank, size in sides:
            if row is None or (slices is held and not counted):
                continue
            line = tensor[row : row + 1] if tensor.dim() == 1 else tensor[row]
            if sample.weight.tp_dim != 1:
                slices.append((number * parts, line, 0))
                continue
            width, count = len(line) * size // parts, parts // size
            for part in range(count):
                place_of_part = rank * count + part
                slices.append(
                    (
                        number * parts + place_of_part,
                        line[part * width : (part + 1) * width],
                        place_of_part * width,
                    )
                )
    return held, needed
