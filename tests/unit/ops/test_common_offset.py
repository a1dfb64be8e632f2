"""All logits moved by the same large number: log p, its gradient and the entropy depend on differences
alone."""

import pytest
import torch

from rlsc_mcore.ops import (
    library,  # noqa: F401  registers torch.ops.rlsc
    token_log_probs,
)
from rlsc_mcore.ops.vocab_parallel import join
from tests.unit.ops import oracle
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import assert_close, value_allowance

VOCAB = 4999


def moved_rows(offset):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator) * 3
    targets = torch.randint(0, VOCAB, (6,), generator=generator)
    logits[1, targets[1]] = 25.0  # confident
    logits[2, targets[2]] = -25.0
    return logits + offset, targets


@pytest.mark.parametrize("offset", [100.0, 1e3, 3e4, -3e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_p_entropy_and_gradient(placement: Placement, offset, temperature):
    """Compared with float64 alone: eager's own rounding of x / temperature is no allowance here."""
    logits, targets = moved_rows(offset)
    weights = torch.linspace(-1, 2, 6)
    options = dict(temperature=temperature, vocab_size=VOCAB)
    exact = oracle.gradient(logits.double(), targets, weights, 0.3 * weights, **options)
    leaf = logits.to(placement.device).requires_grad_()
    log_p, entropy = token_log_probs(
        leaf, targets.to(placement.device), **options, with_entropy=True, backend=placement.backend
    )
    (log_p * weights.to(placement.device) + entropy * 0.3 * weights.to(placement.device)).sum().backward()
    assert_close(log_p, exact[0], value_allowance(exact[0], exact[0]), "log p")
    assert_close(entropy, exact[1], value_allowance(exact[1], exact[1]), "entropy")
    assert_close(leaf.grad, exact[2], 2e-6 * 3 / temperature + 8e-6 * exact[2].abs(), "gradient")


@pytest.mark.parametrize("offset", [1e3, 3e4])
def test_overwriting_ops(placement: Placement, offset):
    logits, targets = moved_rows(offset)
    weights, temperature = torch.linspace(-1, 2, 6), 0.7
    exact, _, grad = oracle.gradient(
        logits.double(),
        targets,
        weights,
        torch.zeros_like(weights),
        temperature=temperature,
        vocab_size=VOCAB,
    )
    here, on_device = logits.to(placement.device, copy=True), targets.to(placement.device)
    log_p = torch.ops.rlsc.log_prob_dlogits_(
        here, on_device, weights.to(placement.device), 1 / temperature, 0, VOCAB, placement.backend
    )
    assert_close(log_p, exact, value_allowance(exact, exact), "log p")
    assert_close(here, grad, 1e-6 * 2 / temperature + 6e-6 * grad.abs(), "gradient")
    here = logits.to(placement.device, copy=True)
    stats = torch.ops.rlsc.rest_softmax_(here, on_device, 1 / temperature, 0, VOCAB, placement.backend)
    assert_close(
        join(stats[None], 1 / temperature).log_probs_T,
        exact,
        value_allowance(exact, exact),
        "log p of the statistics",
    )


@pytest.mark.parametrize("offset", [1e3, 3e4])
def test_shards_join_without_loss(placement: Placement, offset):
    logits, targets = moved_rows(offset)
    exact, _ = oracle.log_probs_and_entropy(logits.double(), targets, temperature=0.7, vocab_size=VOCAB)
    stats = [
        torch.ops.rlsc.log_prob_stats(
            part.contiguous().to(placement.device),
            targets.to(placement.device),
            1 / 0.7,
            start,
            part.shape[1],
            False,
            placement.backend,
        )
        for start, part in zip((0, 2000, 2007), logits.split([2000, 7, VOCAB - 2007], dim=1), strict=True)
    ]
    log_p = join(torch.stack(stats), 1 / 0.7, placement.backend).log_probs_T
    assert_close(log_p, exact, value_allowance(exact, exact), "log p")
