"""linear_weighted_loss against the whole matrix of logits: on-policy coefficients, chunks, Megatron's
main_grad."""

import pytest
import torch

from rlsc_mcore.ops import linear_weighted_loss, sequence_sums
from rlsc_mcore.ops.sequence_sums import per_token
from tests.unit.ops import oracle
from tests.unit.ops.batches import VOCAB, make, to
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import HEAD_SLACK, assert_close

TEMPERATURE, ALPHA = 0.7, 0.1


def coefficients(log_p, mask, cu_seqlens, sequences):
    """exp(mean log p) + alpha per sequence: needs all of a sequence's tokens and only device arithmetic."""
    counts = cu_seqlens.diff().clamp_min(1)
    return per_token(
        (sequence_sums(log_p, mask, cu_seqlens) / counts).exp() + ALPHA, cu_seqlens, log_p.shape[0]
    )


def whole(batch):
    """(loss, log p, gradients of hidden and weight) through all logits at once, in the batch's dtype."""
    hidden, weight = (value.detach().clone().requires_grad_() for value in (batch.hidden, batch.weight))
    log_p = oracle.head_log_probs(
        hidden, weight, batch.targets, batch.mask, temperature=TEMPERATURE, vocab_size=VOCAB
    )
    c = oracle.sequence_weights(log_p.detach(), batch.mask, batch.cu_seqlens, ALPHA)
    loss = -(c * log_p.double()).sum()
    loss.backward()
    return [loss.detach(), log_p.detach(), hidden.grad, weight.grad]


def call(batch, backend="auto", **options):
    return linear_weighted_loss(
        batch.hidden, batch.weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens, coefficient_fn=coefficients,
        temperature=TEMPERATURE, vocab_size=VOCAB, backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [4, 13, 30, 64])  # one sequence in pieces .. all in one chunk
def test_loss_and_gradients_agree_with_float64(placement: Placement, dtype, chunk_tokens):
    batch = make(dtype)
    exact = whole(batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double()))
    eager = whole(batch)
    live_counts, here = batch.live_counts, to(batch, placement.device)
    here.hidden.requires_grad_()
    here.weight.requires_grad_()
    loss, log_p = call(here, placement.backend, chunk_tokens=chunk_tokens, live_counts=live_counts)
    assert loss.dtype == torch.float64
    assert not log_p.requires_grad
    (3.0 * loss).backward()
    got = [loss, log_p, here.hidden.grad / 3.0, here.weight.grad / 3.0]
    for name, ours, expected, theirs in zip(
        ("loss", "log p", "d hidden", "d weight"), got, exact, eager, strict=True
    ):
        slack = (theirs.double() - expected).abs() + 2 * HEAD_SLACK[dtype] * expected.abs().max()
        assert_close(ours, expected, slack, name)
    assert not here.hidden.grad[~here.mask].any()
    assert not here.weight.grad[VOCAB:].any()


def test_gradients_are_finite_differences_in_float64():
    """With constant coefficients the loss is a function whose numeric gradient can be taken."""
    batch = make(torch.float64)
    hidden, weight = (
        batch.hidden[:14, :4].clone().requires_grad_(),
        batch.weight[:23, :4].clone().requires_grad_(),
    )
    fixed = torch.linspace(-1, 2, 14, dtype=torch.float64)
    cu_seqlens, mask = torch.tensor([0, 3, 12, 14], dtype=torch.int32), batch.mask[:14].clone()
    cu_live = torch.tensor([0, *[int(mask[: int(end)].sum()) for end in cu_seqlens[1:]]])

    def loss(hidden, weight):
        return linear_weighted_loss(
            hidden, weight, batch.targets[:14] % 21, mask_T=mask, cu_seqlens=cu_seqlens, vocab_size=21, chunk_tokens=6,
            coefficient_fn=lambda log_p, _, __, sequences: fixed[mask][cu_live[sequences.start] : cu_live[sequences.stop]],
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_the_coefficients_of_a_chunk_see_its_sequences_whole():
    batch, seen = make(torch.float32), []

    def record(log_p, mask, cu_seqlens, sequences):
        seen.append((cu_seqlens.tolist(), sequences, log_p.shape[0], bool(mask.all()), log_p.requires_grad))
        return torch.ones_like(log_p)

    linear_weighted_loss(
        batch.hidden.requires_grad_(), batch.weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens,
        coefficient_fn=record, vocab_size=VOCAB, chunk_tokens=20,
    )  # fmt: skip
    counts = batch.live_counts
    covered = [index for _, sequences, *_ in seen for index in range(sequences.start, sequences.stop)]
    assert covered == list(range(len(counts)))
    for cu_seqlens, sequences, num_tokens, mask_is_full, needs_grad in seen:
        assert cu_seqlens == [
            sum(counts[sequences.start : end]) for end in range(sequences.start, sequences.stop + 1)
        ]
        assert (num_tokens, mask_is_full, needs_grad) == (cu_seqlens[-1], True, False)


def test_without_gradients_only_log_p_is_computed():
    batch = make(torch.float32)
    loss, log_p = call(batch)
    exact = whole(batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double()))
    assert not loss.requires_grad
    assert_close(log_p, exact[1], 1e-5 * (1 + exact[1].abs()), "log p")
    assert_close(loss, exact[0], 1e-5 * exact[0].abs(), "loss")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("unit_upstream", [False, True])
def test_the_weight_gradient_goes_to_megatrons_main_grad(tied, unit_upstream):
    """What Megatron's data parallelism expects of a parameter with main_grad, and of one tied to the
    embedding."""
    batch = make(torch.bfloat16)
    expected = whole(batch)[3]
    weight = torch.nn.Parameter(batch.weight)
    weight.main_grad = torch.full(weight.shape, 2.0)
    weight.grad_added_to_main_grad = False
    if tied:
        weight.zero_out_wgrad = True
    batch.hidden.requires_grad_()
    call(batch._replace(weight=weight), unit_upstream=unit_upstream, chunk_tokens=20)[0].backward()
    assert weight.grad_added_to_main_grad is True
    assert weight.main_grad.dtype == torch.float32
    assert_close(
        weight.main_grad - 2.0,
        expected,
        2 * HEAD_SLACK[torch.bfloat16] * expected.double().abs().max(),
        "main_grad",
    )
    assert weight.grad is not None, "a gradient must be there, or Megatron's hook does not see the parameter"
    assert not tied or not weight.grad.any()


def test_every_token_masked_gives_no_loss_and_zero_gradients():
    batch = make(torch.float32)
    batch = batch._replace(
        mask=torch.zeros_like(batch.mask),
        hidden=batch.hidden.requires_grad_(),
        weight=batch.weight.requires_grad_(),
    )
    loss, log_p = call(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert not log_p.any()
    assert not batch.hidden.grad.any()
    assert not batch.weight.grad.any()


def test_two_runs_agree_bit_for_bit(placement: Placement):
    def run():
        batch = to(make(torch.bfloat16), placement.device)
        batch.hidden.requires_grad_()
        batch.weight.requires_grad_()
        loss, log_p = call(batch, placement.backend, chunk_tokens=13)
        loss.backward()
        return loss.detach(), log_p, batch.hidden.grad, batch.weight.grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_wrong_arguments_are_named():
    batch = make(torch.float32)
    with pytest.raises(ValueError, match=r"live_counts: expected one count per sequence \(7\), got 2"):
        call(batch, live_counts=(1, 2))
    with pytest.raises(ValueError, match="coefficient_fn: expected one coefficient per token"):
        linear_weighted_loss(
            batch.hidden, batch.weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens, vocab_size=VOCAB,
            coefficient_fn=lambda log_p, *_: log_p.sum(),
        )  # fmt: skip
