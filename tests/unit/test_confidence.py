"""Log confidence of each answer against sums in Python's exact arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.algorithm.confidence import group_log_normalizer, log_confidence


@st.composite
def packed_log_probs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probs, mask and cu_seqlens of a few sequences, some empty, some fully masked."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    total = sum(lengths)
    values = draw(st.lists(st.floats(-80, 0, width=32), min_size=total, max_size=total))
    mask = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.tensor(values, dtype=torch.float32), torch.tensor(mask, dtype=torch.bool), cu_seqlens


def exact_sums(values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor) -> list[Fraction]:
    borders = cu_seqlens.tolist()
    return [
        sum(
            (Fraction(v) for v, m in zip(values[a:b].tolist(), mask[a:b].tolist(), strict=True) if m),
            Fraction(0),
        )
        for a, b in pairwise(borders)
    ]


@settings(max_examples=60, deadline=None)
@given(packed_log_probs())
def test_sequence_confidence_is_the_sum(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    values, mask, cu_seqlens = batch
    found = log_confidence(values, mask, cu_seqlens, "sequence")
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([float(s) for s in exact_sums(*batch)], rel=1e-13, abs=1e-13)


@settings(max_examples=60, deadline=None)
@given(packed_log_probs())
def test_length_normalized_confidence_is_the_mean(
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    values, mask, cu_seqlens = batch
    borders = cu_seqlens.tolist()
    counts = [int(mask[a:b].sum()) for a, b in pairwise(borders)]
    expected = [float(total / max(1, count)) for total, count in zip(exact_sums(*batch), counts, strict=True)]
    found = log_confidence(values, mask, cu_seqlens, "length_normalized")
    assert found.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_three_thousand_tokens_do_not_underflow_in_log_space() -> None:
    values = torch.full((3000,), -0.1)
    mask, cu_seqlens = torch.ones(3000, dtype=torch.bool), torch.tensor([0, 3000], dtype=torch.int32)
    exact = 3000 * Fraction(float(np.float32(-0.1)))
    assert float(log_confidence(values, mask, cu_seqlens, "sequence")) == pytest.approx(
        float(exact), rel=1e-14
    )
    assert (
        math.exp(float(exact)) > 0 and float(np.exp(np.float32(exact))) == 0
    )  # gone in float32, there in float64


def test_an_answer_without_trained_tokens_has_log_confidence_zero() -> None:
    mask, cu_seqlens = torch.zeros(3, dtype=torch.bool), torch.tensor([0, 3, 3], dtype=torch.int32)
    for kind in ("sequence", "length_normalized"):
        assert log_confidence(torch.full((3,), -5.0), mask, cu_seqlens, kind).tolist() == [0.0, 0.0]  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.tuples(st.floats(-4000, 0), st.integers(1, 5)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    padding=st.booleans(),
    shuffled=st.randoms(use_true_random=False),
)
def test_group_normalizer_equals_the_expanded_logsumexp(
    groups: list[list[tuple[float, int]]], padding: bool, shuffled: object
) -> None:
    """A sequence sampled k times counts k times, whatever order the sequences were packed in."""
    rows = [(value, count, group) for group, members in enumerate(groups) for value, count in members]
    if padding:
        rows.append((0.0, 0, -1))
    shuffled.shuffle(rows)  # type: ignore[attr-defined]
    values, counts, ids = (
        torch.tensor(column, dtype=kind)
        for column, kind in zip(
            zip(*rows, strict=True), (torch.float64, torch.float64, torch.int64), strict=True
        )
    )
    found = group_log_normalizer(values, counts, ids)
    expanded = {
        g: np.logaddexp.reduce([v for v, k in members for _ in range(k)]) for g, members in enumerate(groups)
    }
    assert found.tolist() == pytest.approx(
        [0.0 if group < 0 else expanded[group] for _, _, group in rows], rel=1e-12
    )
    total = sum(k * math.exp(v - n) for (v, k, g), n in zip(rows, found.tolist(), strict=True) if g == 0)
    assert total == pytest.approx(1.0)  # a question's samples share a weight of 1


def test_nothing_to_normalize() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert len(group_log_normalizer(empty, empty, torch.zeros(0, dtype=torch.int64))) == 0
    alone = group_log_normalizer(
        torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.tensor([-1])
    )
    assert alone.tolist() == [0.0]
