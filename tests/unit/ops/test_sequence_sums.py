"""sequence_sums against math.fsum, one sequence at a time."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlsc_mcore.ops import sequence_sums
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import assert_close


def exact_sums(values, mask, cu_seqlens):
    bounds = cu_seqlens.tolist()
    pairs = list(zip(values.tolist(), mask.tolist(), strict=True))
    return torch.tensor(
        [math.fsum(v for v, m in pairs[start:stop] if m) for start, stop in pairwise(bounds)],
        dtype=torch.float64,
    )


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), tail=st.integers(0, 3), seed=st.integers(0, 2**16))
def test_any_packing(lengths, tail, seed):
    """Empty sequences, one-token sequences, masked sequences, tokens behind the last offset."""
    check(torch.device("cpu"), "auto", lengths, tail, seed)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 300, 2, 0], [0], [4000, 1], [1] * 70])
def test_packings_on_every_backend(placement: Placement, lengths):
    check(placement.device, placement.backend, lengths, tail=3, seed=1)


def check(device, backend, lengths, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths) + tail
    values = torch.randn(num_tokens, generator=generator) - 1.0
    mask = torch.rand(num_tokens, generator=generator) > 0.3
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    leaf = values.to(device).requires_grad_()
    sums = sequence_sums(leaf, mask.to(device), cu_seqlens.to(device), backend=backend)
    assert sums.dtype == torch.float64
    expected = exact_sums(values, mask, cu_seqlens)
    assert_close(sums, expected, 1e-13 * (1 + expected.abs()), "sums")
    weights = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    (sums * weights.to(device)).sum().backward()
    spread = torch.zeros(num_tokens)
    for s, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        spread[start:stop] = weights[s].float()
    assert torch.equal(leaf.grad.cpu(), torch.where(mask, spread, 0.0))


def test_thousands_of_terms_keep_their_digits(placement: Placement):
    """A float32 sum of 3072 log-probs is off by 1e-4 and more: exp of it by as much."""
    values = -torch.rand(3072, generator=torch.Generator().manual_seed(0)) * 1e-3
    values[0] = -1e4
    mask, cu_seqlens = torch.ones(3072, dtype=torch.bool), torch.tensor([0, 3072], dtype=torch.int32)
    exact = exact_sums(values, mask, cu_seqlens)
    got = sequence_sums(
        values.to(placement.device),
        mask.to(placement.device),
        cu_seqlens.to(placement.device),
        backend=placement.backend,
    )
    assert_close(got, exact, 1e-9, "sum")
    assert abs(float(values.cumsum(0)[-1]) - float(exact)) > 1e-4, (
        "the test's values no longer show the difference"
    )


def test_a_masked_nan_does_not_spread(placement: Placement):
    values = torch.tensor([1.0, float("nan"), 2.0], device=placement.device)
    mask = torch.tensor([True, False, True], device=placement.device)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=placement.device)
    assert sequence_sums(values, mask, cu_seqlens, backend=placement.backend).tolist() == [3.0]


def test_wrong_arguments_are_named():
    values, mask, cu_seqlens = (
        torch.zeros(4),
        torch.ones(4, dtype=torch.bool),
        torch.tensor([0, 4], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="values_T: expected float32 or float64"):
        sequence_sums(values.bfloat16(), mask, cu_seqlens)
    with pytest.raises(ValueError, match=r"mask_T: expected bool \[4\]"):
        sequence_sums(values, mask[:3], cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens: expected int32"):
        sequence_sums(values, mask, cu_seqlens.long())
