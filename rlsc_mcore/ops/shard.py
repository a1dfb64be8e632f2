"""Describe the vocabulary columns of a rank, and check the arguments of the ops.

Shape suffixes: T tokens, Vp vocabulary columns (or weight rows) of this rank with padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + num_columns) of the unpadded vocabulary. Later columns of the rank's logits are
    padding."""

    start: int
    num_columns: int
    inv_temperature: float

    @staticmethod
    def of(columns_Vp: int, vocab_size: int, vocab_start: int, temperature: float) -> "VocabShard":
        """Build the shard of a rank whose logits have `columns_Vp` columns; ValueError if temperature or
        sizes are out of range."""
        if not temperature > 0:
            raise ValueError(
                f"temperature: expected more than 0, got {temperature}; greedy decoding has no "
                "log-probability to train"
            )
        if vocab_size < 1 or vocab_start < 0:
            raise ValueError(
                f"vocab_size, vocab_start: expected at least 1 and at least 0, got {vocab_size}, "
                f"{vocab_start}"
            )
        return VocabShard(vocab_start, min(max(vocab_size - vocab_start, 0), columns_Vp), 1.0 / temperature)

    def as_arguments(self) -> tuple[float, int, int]:
        """Return the shard arguments of the row ops: 1 / temperature, id of the first column, number of real
        columns."""
        return self.inv_temperature, self.start, self.num_columns


def check_rows(matrix: Tensor, target_ids_T: Tensor, num_rows: int, what: str) -> None:
    """Raise ValueError if shape, dtype, strides or device of a matrix and its row targets do not match."""
    if matrix.dim() != 2 or matrix.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{what}: expected [T, columns] in float32, float16 or bfloat16, got {list(matrix.shape)} "
            f"{matrix.dtype}"
        )
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(
            f"{what}: expected contiguous rows (stride 1 in the last dim), got strides {matrix.stride()}; "
            "call .contiguous()"
        )
    if target_ids_T.shape != (num_rows,) or target_ids_T.dtype != torch.int64:
        raise ValueError(
            f"target_ids_T: expected int64 [{num_rows}], got {target_ids_T.dtype} {list(target_ids_T.shape)}"
        )
    if target_ids_T.device != matrix.device:
        raise ValueError(f"target_ids_T: expected on {matrix.device} like {what}, got {target_ids_T.device}")


def check_target_range(target_ids_T: Tensor, vocab_size: int) -> None:
    """Raise ValueError for a target beyond the vocabulary. Checks only plain tensors in CPU memory, to avoid
    a device-to-host copy."""
    if torch.compiler.is_compiling() or type(target_ids_T) is not Tensor or target_ids_T.device.type != "cpu":
        return
    largest = int(target_ids_T.max()) if target_ids_T.numel() else 0
    if largest >= vocab_size:
        raise ValueError(f"target_ids_T: expected ids below vocab_size {vocab_size}, got {largest}")
