"""Rows of logits that have gone wrong somewhere: borders, padding, strides, infinities, confident tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

VOCAB = 1037  # not a multiple of 8, of a warp, of a block or of any tensor-parallel size
COLUMNS = 1048  # with padding
IGNORED = -1


class Rows(NamedTuple):
    """Logits with padding, their targets and non-uniform upstream weights of both signs."""

    logits: Tensor  # [T, COLUMNS], padding columns NaN
    targets: Tensor  # int64 [T], some ignored
    weights: Tensor  # float32 [T]
    entropy_weights: Tensor  # float32 [T]


def make(
    dtype: torch.dtype, *, seed: int = 0, num_rows: int = 14, row_stride: int = COLUMNS, extreme: bool = False
) -> Rows:
    """Draw rows; `extreme` adds -inf logits, +-3e4 logits, a row with one finite logit and a target at
    -inf."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((num_rows, row_stride), float("nan"))
    logits = storage[:, :COLUMNS]
    logits[:, :VOCAB] = torch.randn(num_rows, VOCAB, generator=generator) * 3
    targets = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    targets[:4] = torch.tensor([0, VOCAB - 1, 511, 512])
    targets[4] = targets[9] = IGNORED
    logits[5, targets[5]] = 30.0  # confident
    logits[6, targets[6]] = -30.0  # hopeless
    if extreme:
        logits[7, ::2] = float("-inf")
        logits[8, :VOCAB] = float("-inf")
        logits[8, targets[8]] = 1.0
        logits[10, :VOCAB] *= 4e3
        logits[11, 3], logits[11, int(targets[11])] = 3e4, -3e4
        logits[12, targets[12]] = float("-inf")
        logits[7, targets[7]] = 1.0
    return Rows(
        storage.to(dtype)[:, :COLUMNS],
        targets,
        torch.randn(num_rows, generator=generator),
        torch.randn(num_rows, generator=generator),
    )


def to(rows: Rows, device: torch.device) -> Rows:
    """Move rows to a device, strides kept."""
    stride = rows.logits.stride(0)
    storage = torch.full((rows.logits.shape[0], stride), float("nan"), dtype=rows.logits.dtype, device=device)
    storage[:, : rows.logits.shape[1]] = rows.logits.to(device)
    return Rows(storage[:, : rows.logits.shape[1]], *(value.to(device) for value in rows[1:]))
