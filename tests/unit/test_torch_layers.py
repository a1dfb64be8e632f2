"""The layers on torch's operations, against plain formulas in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from rlsc_mcore.model.torch_layers import RotaryFactors, SDPACoreAttention, SwiGLU


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    config: Any = SimpleNamespace(gated_linear_unit=True, activation_func=silu)
    return SwiGLU(config)(gate_up)


def attention(scale: float = 0.5) -> SDPACoreAttention:
    return SDPACoreAttention(SimpleNamespace(kv_channels=4), softmax_scale=scale)  # type: ignore[arg-type]


def test_swiglu_and_its_gradient() -> None:
    gate_up = torch.randn(3, 2, 14, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate_up), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))


def test_rotation_keeps_lengths_and_has_the_right_gradient() -> None:
    angles = torch.rand(9, 1, 1, 4).repeat(1, 1, 1, 2)
    factors = RotaryFactors.of(angles, (4, 9, 1), torch.float64)
    heads = torch.randn(14, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(factors.rotate(heads).norm(dim=-1), heads.norm(dim=-1))
    assert torch.autograd.gradcheck(factors.rotate, (heads,))


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Attend in each sequence, head by head, with the whole matrix of scores; scale 0.5."""
    repeat, outputs = query.size(1) // key.size(1), []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("lengths", [[5, 5, 5, 3, 3, 1], [3, 5, 3], [7], [1, 1]])
def test_packed_attention_stays_within_each_sequence(lengths: list[int]) -> None:
    """Neighbours of equal length are computed in one call."""
    total = sum(lengths)
    query = torch.randn(total, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    packed: Any = SimpleNamespace(sequence_lengths=lengths)
    found = attention()(query, key, value, packed_seq_params=packed)
    expected = reference(query, key, value, lengths)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    inputs = (query, key, value)
    for ours, plain in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)
