"""The weights and the loss against float64 NumPy, and the gradient identity on policies small enough to
enumerate."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.algorithm.confidence import group_log_normalizer
from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.ops import sequence_sums

KINDS = ["sequence", "length_normalized", "token", "group_softmax"]


def objective(num_samples: int = 1, **options: Any) -> WeightedObjective:
    return WeightedObjective(AlgorithmConfig(**options), num_samples)


def oracle(
    sequences: list[np.ndarray],
    multiplicity: list[int],
    groups: list[int],
    options: dict[str, Any],
    num_samples: int,
) -> tuple[list[np.ndarray], list[float]]:
    """Coefficients of every trained token and the weight of one sample of each sequence, straight from the
    definitions."""
    alpha, kind = options["alpha"], options["confidence"]
    sums = [float(np.sum(values, dtype=np.longdouble)) for values in sequences]
    coefficients, weights = [], []
    for values, total, count, group in zip(sequences, sums, multiplicity, groups, strict=True):
        if options["objective"] == "self_sft":
            weight: Any = np.ones(len(values))
        elif kind == "sequence":
            weight = np.full(len(values), math.exp(total) + alpha)
        elif kind == "length_normalized":
            weight = np.full(len(values), math.exp(total / max(1, len(values))) + alpha)
        elif kind == "token":
            weight = np.exp(values.astype(np.float64)) + alpha
        else:  # expanded: one row per sample of the question
            expanded = [
                s for s, k, g in zip(sums, multiplicity, groups, strict=True) if g == group for _ in range(k)
            ]
            weight = np.full(len(values), math.exp(total - np.logaddexp.reduce(expanded)) + alpha)
        scale = count / num_samples if options["reduction"] == "mean" else count
        coefficients.append(weight * scale)
        weights.append(float(np.mean(weight)) if len(values) else math.nan)
    return coefficients, weights


def pack(sequences: list[np.ndarray], prompts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay sequences end to end, each after `prompts` untrained positions and before one more."""
    values, mask, lengths = [], [], [0]
    for sequence, before in zip(sequences, prompts, strict=True):
        values += [-9.0] * before + sequence.tolist() + [-9.0]
        mask += [False] * before + [True] * len(sequence) + [False]
        lengths.append(before + len(sequence) + 1)
    return (
        torch.tensor(values),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(lengths).cumsum(0).to(torch.int32),
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    alpha=st.sampled_from([0.0, 0.1, 2.5]),
    reduction=st.sampled_from(["mean", "sum"]),
    loss_of=st.sampled_from(["rlsc", "rlsc", "self_sft"]),
)
def test_coefficients_and_weights_equal_the_definitions(
    data: st.DataObject, kind: str, alpha: float, reduction: str, loss_of: str
) -> None:
    lists = data.draw(
        st.lists(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=8), min_size=1, max_size=5)
    )
    sequences = [np.array(values, dtype=np.float32) for values in lists]
    size = len(sequences)
    multiplicity = data.draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    prompts = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    options = {"confidence": kind, "alpha": alpha, "reduction": reduction, "objective": loss_of}
    num_samples = sum(multiplicity)
    log_probs, mask, cu_seqlens = pack(sequences, prompts)
    counts = torch.tensor(multiplicity, dtype=torch.float64)
    made = objective(num_samples, **options)
    normalizer = None
    if made.needs_group:
        normalizer = group_log_normalizer(
            sequence_sums(log_probs, mask, cu_seqlens), counts, torch.tensor(groups)
        )
    found = made.token_coefficients(log_probs, mask, cu_seqlens, counts, normalizer)
    expected, weights = oracle(sequences, multiplicity, groups, options, num_samples)
    assert found.dtype == torch.float32 and not found[~mask].any()
    np.testing.assert_allclose(found[mask].numpy(), np.concatenate(expected), rtol=2e-7, atol=1e-44)
    np.testing.assert_allclose(
        made.weights(log_probs, mask, cu_seqlens, normalizer).numpy(), weights, rtol=1e-12
    )


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_tokens(kind: str, alpha: float) -> None:
    """p = e^-300: exactly alpha is left of an L2 weight, float64's e^-300 of an L1 weight, and never NaN."""
    sequences = [np.full(3000, -0.1, dtype=np.float32), np.full(3000, -0.2, dtype=np.float32)]
    log_probs, mask, cu_seqlens = pack(sequences, [5, 0])
    counts, groups = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([0, 0])
    made = objective(4, confidence=kind, alpha=alpha)
    normalizer = group_log_normalizer(sequence_sums(log_probs, mask, cu_seqlens), counts, groups)
    options = {"confidence": kind, "alpha": alpha, "reduction": "mean", "objective": "rlsc"}
    expected, weights = oracle(sequences, [3, 1], [0, 0], options, 4)
    found = made.weights(log_probs, mask, cu_seqlens, normalizer)
    np.testing.assert_allclose(found.numpy(), weights, rtol=1e-9)
    coefficients = made.token_coefficients(log_probs, mask, cu_seqlens, counts, normalizer)[mask]
    assert torch.isfinite(coefficients).all()
    np.testing.assert_allclose(coefficients.numpy(), np.concatenate(expected).astype(np.float32), rtol=1e-6)
    if kind == "sequence":
        assert float(found[0]) == pytest.approx(math.exp(3000 * float(np.float32(-0.1))) + alpha, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_nothing_trained_means_no_coefficient(kind: str, alpha: float) -> None:
    """Empty answers, all-masked sequences and padding beside one real answer."""
    log_probs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    mask = torch.tensor([False, False, True, False])
    cu_seqlens = torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32)
    counts = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    normalizer = torch.tensor([0.0, 0.0, -3.0, 0.0], dtype=torch.float64)
    made = objective(4, confidence=kind, alpha=alpha)
    found = made.token_coefficients(log_probs, mask, cu_seqlens, counts, normalizer)
    assert torch.isfinite(found).all() and found[~mask].tolist() == [0, 0, 0] and found[2] > 0
    nothing = made.token_coefficients(
        log_probs, torch.zeros(4, dtype=torch.bool), cu_seqlens, counts, normalizer
    )
    assert not nothing.any()
    assert torch.isfinite(
        made.weights(log_probs, torch.zeros(4, dtype=torch.bool), cu_seqlens, normalizer)
    ).all()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_samples_weigh_what_they_did_one_by_one(kind: str) -> None:
    values = [np.array([-0.5, -1.0], np.float32), np.array([-2.0], np.float32)]
    merged, expanded = [0, 1], [0, 0, 0, 1]
    totals = []
    for members, counts in ((merged, [3.0, 1.0]), (expanded, [1.0] * 4)):
        log_probs, mask, cu_seqlens = pack([values[i] for i in members], [1] * len(members))
        multiplicity = torch.tensor(counts, dtype=torch.float64)
        made = objective(4, confidence=kind)
        groups = torch.zeros(len(members), dtype=torch.int64)
        normalizer = group_log_normalizer(sequence_sums(log_probs, mask, cu_seqlens), multiplicity, groups)
        coefficients = made.token_coefficients(log_probs, mask, cu_seqlens, multiplicity, normalizer)
        totals.append(float((coefficients * log_probs).sum()))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


def test_weights_are_frozen() -> None:
    """The confidence is p_old: no gradient flows through it, so a step follows p_old grad log p and not twice
    that."""
    log_probs = torch.tensor([-1.0, -2.0])
    mask, cu_seqlens = torch.ones(2, dtype=torch.bool), torch.tensor([0, 2], dtype=torch.int32)
    made = objective(1, alpha=0.0)
    detached = made.token_coefficients(log_probs, mask, cu_seqlens, torch.ones(1, dtype=torch.float64))
    assert detached.tolist() == pytest.approx([math.exp(-3)] * 2)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.0, 0.5), (0.1, 0.5), (0.1, 1.0)])
def test_expected_gradient_is_half_the_gradient_of_f(alpha: float, temperature: float) -> None:
    """1/2 grad F = E_{y ~ p}[p(y) grad log p(y)] on a policy of two tokens over three symbols; the alpha term
    is zero on average."""
    torch.manual_seed(1)
    first = torch.randn(3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def token_log_probs(answer: tuple[int, int]) -> torch.Tensor:
        rows = torch.stack([first, second[answer[0]]]) / temperature
        return torch.log_softmax(rows, dim=1).gather(1, torch.tensor(answer)[:, None])[:, 0]

    answers = list(itertools.product(range(3), repeat=2))
    f = sum(token_log_probs(answer).sum().exp() ** 2 for answer in answers)
    expected = torch.autograd.grad(0.5 * f, [first, second])

    made = objective(1, alpha=alpha, reduction="sum")
    loss = torch.zeros((), dtype=torch.float64)
    for answer in answers:  # every answer, weighted by how often it would be sampled
        log_probs = token_log_probs(answer)
        mask, cu_seqlens = torch.ones(2, dtype=torch.bool), torch.tensor([0, 2], dtype=torch.int32)
        coefficients = made.token_coefficients(
            log_probs.detach(), mask, cu_seqlens, torch.ones(1, dtype=torch.float64)
        ).double()
        loss = loss - log_probs.sum().exp().detach() * (coefficients * log_probs).sum()
    found = torch.autograd.grad(-loss, [first, second])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_what_an_objective_needs() -> None:
    assert [objective(confidence=kind).needs_group for kind in KINDS] == [False, False, False, True]
    assert not objective(objective="self_sft", confidence="group_softmax").needs_group
    assert objective(alpha=0.3).alpha == 0.3 and objective(objective="self_sft", alpha=0.3).alpha == 0.0
