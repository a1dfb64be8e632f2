"""linear_token_log_probs against the whole matrix of logits in float64."""

import pytest
import torch

from rlsc_mcore.ops import linear_token_log_probs
from tests.unit.ops import oracle
from tests.unit.ops.batches import VOCAB, make, to
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import HEAD_SLACK, assert_close

TEMPERATURE = 0.7


def whole(batch, upstream, entropy_upstream):
    """(log p, entropy, gradients of hidden and weight) through all logits at once, in the batch's dtype."""
    hidden, weight = (value.detach().clone().requires_grad_() for value in (batch.hidden, batch.weight))
    logits = hidden @ weight.t()
    log_p, entropy = oracle.log_probs_and_entropy(
        logits, batch.targets, temperature=TEMPERATURE, vocab_size=VOCAB
    )
    log_p, entropy = log_p * batch.mask, entropy * batch.mask
    (log_p * upstream.to(log_p.dtype) + entropy * entropy_upstream.to(log_p.dtype)).sum().backward()
    return [log_p.detach(), entropy.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_agree_with_float64(placement: Placement, dtype, chunk_tokens, with_entropy):
    batch = make(dtype)
    generator = torch.Generator().manual_seed(3)
    upstream, entropy_upstream = (torch.randn(batch.targets.shape[0], generator=generator) for _ in range(2))
    entropy_upstream *= with_entropy
    exact = whole(
        batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double()), upstream, entropy_upstream
    )
    eager = whole(batch, upstream, entropy_upstream)
    here = to(batch, placement.device)
    hidden, weight = here.hidden.requires_grad_(), here.weight.requires_grad_()
    out = linear_token_log_probs(
        hidden, weight, here.targets, mask_T=here.mask, temperature=TEMPERATURE, vocab_size=VOCAB, chunk_tokens=chunk_tokens,
        with_entropy=with_entropy, backend=placement.backend,
    )  # fmt: skip
    log_p, entropy = out if with_entropy else (out, torch.zeros_like(out))
    (log_p * upstream.to(placement.device) + entropy * entropy_upstream.to(placement.device)).sum().backward()
    assert log_p.dtype == torch.float32
    assert not log_p[~here.mask].any()
    assert not hidden.grad[~here.mask].any()
    got = [log_p, entropy, hidden.grad, weight.grad]
    for name, ours, expected, theirs in zip(
        ("log p", "entropy", "d hidden", "d weight"), got, exact, eager, strict=True
    ):
        if name == "entropy" and not with_entropy:
            continue
        slack = (theirs.double() - expected).abs() + HEAD_SLACK[dtype] * expected.abs().max()
        assert_close(ours, expected, slack, name)


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_gradients_are_finite_differences_in_float64(chunk_tokens):
    batch = make(torch.float64)
    hidden, weight = (
        batch.hidden[:10, :4].clone().requires_grad_(),
        batch.weight[:23, :4].clone().requires_grad_(),
    )
    targets, mask = batch.targets[:10] % 21, batch.mask[:10]

    def log_probs(hidden, weight):
        return linear_token_log_probs(
            hidden,
            weight,
            targets,
            mask_T=mask,
            vocab_size=21,
            temperature=TEMPERATURE,
            chunk_tokens=chunk_tokens,
            with_entropy=True,
        )

    assert torch.autograd.gradcheck(log_probs, (hidden, weight))


def test_no_live_token_gives_zeros_and_zero_gradients():
    batch = make(torch.float32)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    out = linear_token_log_probs(
        hidden, weight, batch.targets, mask_T=torch.zeros_like(batch.mask), vocab_size=VOCAB
    )
    out.sum().backward()
    assert not out.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_wrong_arguments_are_named():
    batch = make(torch.float32)
    with pytest.raises(ValueError, match="hidden_TH: expected 64 rows like target_ids_T, got 63"):
        linear_token_log_probs(
            batch.hidden[:-1], batch.weight, batch.targets, mask_T=batch.mask, vocab_size=VOCAB
        )
    with pytest.raises(ValueError, match="same hidden size and dtype"):
        linear_token_log_probs(
            batch.hidden, batch.weight.double(), batch.targets, mask_T=batch.mask, vocab_size=VOCAB
        )
    with pytest.raises(ValueError, match=r"mask_T: expected bool \[64\]"):
        linear_token_log_probs(
            batch.hidden, batch.weight, batch.targets, mask_T=batch.mask.float(), vocab_size=VOCAB
        )
