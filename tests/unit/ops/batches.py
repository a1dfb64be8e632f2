"""A packed batch for the fused head: prompts masked out, an empty and a fully masked sequence, a one-token
answer."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

VOCAB, PADDED_VOCAB, HIDDEN = 211, 224, 32


class Batch(NamedTuple):
    hidden: Tensor  # [T, HIDDEN]
    weight: Tensor  # [PADDED_VOCAB, HIDDEN], padding rows 9
    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor

    @property
    def live_counts(self) -> list[int]:
        bounds = self.cu_seqlens.tolist()
        return [int(self.mask[start:stop].sum()) for start, stop in pairwise(bounds)]


def make(dtype: torch.dtype, seed: int = 0) -> Batch:
    """Draw a batch of 64 tokens in 7 sequences; some tokens are confident."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [12, 0, 5, 9, 24, 6, 8]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_tokens = int(cu_seqlens[-1])
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[:5] = mask[12:16] = mask[17:20] = False  # prompts; the third sequence keeps one token
    mask[50:56] = False  # the sixth is masked out
    weight = torch.full((PADDED_VOCAB, HIDDEN), 9.0)
    weight[:VOCAB] = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
    targets[5], targets[6] = 0, VOCAB - 1
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    hidden[30:34] = weight[targets[30:34]]
    return Batch(hidden.to(dtype), weight.to(dtype), targets, mask, cu_seqlens)


def to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(value.to(device) for value in batch))
