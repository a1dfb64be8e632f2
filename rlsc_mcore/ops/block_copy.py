"""Copy many rectangles of memory at once: few kernel launches on a GPU, torch's own loop on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlsc_mcore.ops.triton_rows import why_not

ALIGNMENT_BYTES = 16  # required by a vector load
ROW_ELEMENTS = 1024  # row length of a contiguous block; keeps all lanes of a program busy


class BlockCopy:
    """Copies `sources` into `targets` on every `run`, converting between floating types.

    Both lists hold views of one or two dimensions with innermost stride 1. All sources have one dtype and all
    targets have one dtype. The storage must not move after construction, and blocks must not overlap. On a
    CUDA device with Triton, `run` takes one kernel launch for all blocks that allow 16-byte loads and one for
    the others; elsewhere it calls `torch._foreach_copy_`. Raises `ValueError` if lengths, shapes, dtypes or
    devices do not match.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if len(targets) != len(sources):
            raise ValueError(f"block copy: {len(targets)} targets, but {len(sources)} sources")
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            _check(number, target, source, targets[0], sources[0])
        pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target.numel()]
        self._targets, self._sources = [target for target, _ in pairs], [source for _, source in pairs]
        self.num_bytes = sum(
            t.numel() * (t.element_size() + s.element_size()) for t, s in pairs
        )  # read and written
        self._tables: list[tuple[Any, bool]] = []
        if pairs and why_not("copy_blocks", pairs[0][0].device.type) is None:
            from rlsc_mcore.ops import triton_copy

            rectangles = [_rectangle(target, source) for target, source in pairs]
            for aligned in (True, False):
                rows = [values for values, is_aligned in rectangles if is_aligned is aligned]
                if rows:
                    self._tables.append((triton_copy.make_table(rows, pairs[0][0].device), aligned))

    @torch.no_grad()
    def run(self) -> None:
        """Copy every block; mutates the targets."""
        if not self._targets:
            return
        if not self._tables:
            torch._foreach_copy_(self._targets, self._sources)
            return
        from rlsc_mcore.ops import triton_copy

        for table, aligned in self._tables:
            triton_copy.copy_blocks(table, self._targets[0].dtype, self._sources[0].dtype, aligned)


def _check(number: int, target: Tensor, source: Tensor, first_target: Tensor, first_source: Tensor) -> None:
    if target.shape != source.shape or target.dim() not in (1, 2):
        raise ValueError(
            f"block copy: block {number}: expected equal shapes of 1 or 2 dimensions, got "
            f"{tuple(target.shape)} from {tuple(source.shape)}"
        )
    if target.dtype != first_target.dtype or source.dtype != first_source.dtype:
        raise ValueError(
            f"block copy: block {number} is {source.dtype} to {target.dtype}, the first {first_source.dtype} "
            f"to {first_target.dtype}"
        )
    if target.device != source.device or target.device != first_target.device:
        raise ValueError(
            f"block copy: block {number} goes from {source.device} to {target.device}, the first is on "
            f"{first_target.device}"
        )
    for side, tensor in (("target", target), ("source", source)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"block copy: block {number}: the {side}'s innermost stride is {tensor.stride(-1)}, expected "
                "1"
            )


def _rectangle(target: Tensor, source: Tensor) -> tuple[tuple[int, ...], bool]:
    """Return (source address, target address, rows, columns, source row stride, target row stride), and
    whether 16-byte vectors can be loaded."""
    if target.is_contiguous() and source.is_contiguous():
        columns = ROW_ELEMENTS if target.numel() % ROW_ELEMENTS == 0 else target.numel()
        rows, strides = target.numel() // columns, (columns, columns)
    elif target.dim() == 1:
        rows, columns, strides = 1, target.numel(), (0, 0)
    else:
        (rows, columns), strides = target.shape, (source.stride(0), target.stride(0))
    vector = ALIGNMENT_BYTES // min(
        target.element_size(), source.element_size()
    )  # elements per vector load of both sides
    addresses = all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in (target, source))
    aligned = addresses and all(size % vector == 0 for size in (columns, *strides))
    return (source.data_ptr(), target.data_ptr(), rows, columns, *strides), aligned
