"""KL(uniform || p) of tokens against all logits in float64, and over vocabulary shards."""

import numpy as np
import pytest
import torch

from rlsc_mcore.ops import linear_self_certainty, linear_token_log_probs
from tests.helpers.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED = 12, 16, 50, 64


def make_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = torch.arange(TOKENS) % 3 != 1
    return hidden, weight, targets, mask


def self_certainty(
    tensors: tuple[torch.Tensor, ...], temperature: float, start: int = 0, group: object = None
) -> torch.Tensor:
    hidden, weight, targets, mask = tensors
    options: dict[str, object] = {
        "mask_T": mask, "num_live": int(mask.sum()), "vocab_size": VOCAB, "temperature": temperature,
        "vocab_start": start, "group": group,
    }  # fmt: skip
    log_probs = linear_token_log_probs(hidden, weight, targets, **options)  # type: ignore[arg-type]
    return linear_self_certainty(hidden, weight, targets, log_probs, **options)  # type: ignore[arg-type]


def expected_values(tensors: tuple[torch.Tensor, ...], temperature: float) -> "np.ndarray[object, object]":
    hidden, weight, _, mask = (tensor.double().numpy() for tensor in tensors)
    logits = hidden @ weight[:VOCAB].T / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    uniform = np.full(VOCAB, 1 / VOCAB)
    return np.where(mask > 0, (uniform * (np.log(uniform) - np.log(p))).sum(1), 0.0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.2)]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_equals_the_divergence_over_all_logits(
    dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    tensors = make_inputs(dtype)
    found = self_certainty(tensors, temperature).double().numpy()
    np.testing.assert_allclose(found, expected_values(tensors, temperature), atol=tolerance)


def on_a_shard(temperature: float) -> torch.Tensor:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups

    groups = initialize_groups(get_backend(), 2)
    hidden, weight, targets, mask = make_inputs(torch.float64)
    rank, rows = groups.rank, PADDED // 2
    shard = weight[rank * rows : (rank + 1) * rows]
    return self_certainty((hidden, shard, targets, mask), temperature, rank * rows, groups.tp_group)


@pytest.mark.distributed
def test_vocabulary_shards_equal_the_whole() -> None:
    expected = expected_values(make_inputs(torch.float64), 0.5)
    for found in run_ranks(2, on_a_shard, 0.5):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
