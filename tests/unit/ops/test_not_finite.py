"""Logits that are not finite, on every backend: NaN and +inf end in NaN as they do in log_softmax, and in no
other row."""

import pytest
import torch

from rlsc_mcore.ops import (
    library,  # noqa: F401  registers torch.ops.rlsc
    linear_weighted_loss,
    token_log_probs,
)
from rlsc_mcore.ops.reference import NEG_INF
from rlsc_mcore.ops.vocab_parallel import join, join_backward
from tests.unit.ops.batches import VOCAB as HEAD_VOCAB
from tests.unit.ops.batches import make as make_batch
from tests.unit.ops.batches import to as batch_to
from tests.unit.ops.conftest import Placement

NAN, INF = float("nan"), float("inf")
PADDING = 5


def one_element(value):
    def spoil(row, target):
        row[(target + len(row) // 2) % len(row)] = value

    return spoil


def at_target(value):
    def spoil(row, target):
        row[target] = value

    return spoil


def nothing_else(value):
    """One element of the rest is `value`, every other one -inf."""

    def spoil(row, target):
        finite = row[target].clone()
        row[:] = NEG_INF
        row[target] = finite
        row[(target + 1) % len(row)] = value

    return spoil


def whole_row(value):
    def spoil(row, target):
        row[:] = value

    return spoil


SPOILED = {
    "one NaN": one_element(NAN),
    "NaN at the target": at_target(NAN),
    "NaN among -inf": nothing_else(NAN),
    "all NaN": whole_row(NAN),
    "one +inf": one_element(INF),
    "+inf at the target": at_target(INF),
    "+inf among -inf": nothing_else(INF),
    "all +inf": whole_row(INF),
    "all -inf": whole_row(NEG_INF),
}

IN_LONG_ROWS = ("one NaN", "NaN among -inf", "+inf at the target")


def spoiled_rows(kind, vocab, dtype):
    """Five rows of which the second and the last are spoiled; the third is ignored and NaN. Padding columns
    are NaN."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.full((5, vocab + PADDING), NAN)
    logits[:, :vocab] = torch.randn(5, vocab, generator=generator)
    targets = torch.randint(0, vocab, (5,), generator=generator)
    for row in (1, 4):
        SPOILED[kind](logits[row, :vocab], int(targets[row]))
    logits[2] = NAN
    targets[2] = -1
    return logits.to(dtype), targets


@pytest.mark.parametrize(
    ("kind", "vocab", "dtype", "with_entropy"),
    [(kind, 37, torch.float32, True) for kind in SPOILED]
    + [(kind, 5003, torch.bfloat16, False) for kind in IN_LONG_ROWS]
    + [(kind, 9001, torch.float16, True) for kind in IN_LONG_ROWS],
)
def test_log_p_and_its_gradient_are_nan_where_log_softmax_is(
    placement: Placement, kind, vocab, dtype, with_entropy
):
    """Rows of one block, of several blocks of a CPU's op, and of several steps of a GPU's."""
    logits, targets = spoiled_rows(kind, vocab, dtype)
    expected = torch.log_softmax(logits[:, :vocab].double(), 1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    expected[2] = 0.0
    leaf = logits.to(placement.device).requires_grad_()
    out = token_log_probs(
        leaf,
        targets.to(placement.device),
        vocab_size=vocab,
        with_entropy=with_entropy,
        backend=placement.backend,
    )
    log_p = out[0] if with_entropy else out
    log_p.sum().backward()
    assert torch.equal(log_p.isnan().cpu(), expected.isnan())
    assert expected[[1, 4]].isnan().all()
    grad = leaf.grad.cpu()
    assert grad[[1, 4], :vocab].isnan().all(), "the gradient of a NaN log p is NaN in every real column"
    assert grad[[0, 3], :vocab].isfinite().all()
    assert not grad[2].any()
    assert not grad[:, vocab:].any()
    if with_entropy:
        assert torch.equal(out[1].isnan().cpu(), expected.isnan())


@pytest.mark.parametrize(
    ("kind", "vocab", "dtype"),
    [(kind, 37, torch.float32) for kind in SPOILED]
    + [(kind, 40003, torch.bfloat16) for kind in IN_LONG_ROWS],
)
def test_overwriting_ops_keep_nan(placement: Placement, kind, vocab, dtype):
    logits, targets = (value.to(placement.device) for value in spoiled_rows(kind, vocab, dtype))
    shard, weights = (1.0, 0, vocab), torch.linspace(-1, 1, 5, device=placement.device)
    weighted, rest = logits.clone(), logits.clone()
    log_p = torch.ops.rlsc.log_prob_dlogits_(weighted, targets, weights, *shard, placement.backend)
    assert log_p.isnan().tolist() == [False, True, False, False, True]
    assert weighted[[1, 4], :vocab].isnan().all()
    stats = torch.ops.rlsc.rest_softmax_(rest, targets, *shard, placement.backend)
    joined = join(stats[None], 1.0, placement.backend)
    assert joined.log_probs_T.isnan().tolist() == [False, True, False, False, True]
    assert joined.target_excluded_T.isnan().tolist() == [False, True, False, False, True]
    for written in (weighted, rest):
        assert written[[0, 3]].isfinite().all()
        assert not written[2].any()
        assert not written[:, vocab:].any()


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("spoiled_rank", [0, 1, 2])
def test_one_rank_of_three_spoils_its_tokens_on_every_rank(placement: Placement, kind, spoiled_rank):
    """The target lies on rank 1; a rank without a finite logit, and one without columns, are among the
    others."""
    generator = torch.Generator().manual_seed(1)
    shards = [torch.randn(4, 16, generator=generator) for _ in range(3)]
    targets = torch.tensor([16, 20, 31, -1])
    SPOILED[kind](shards[spoiled_rank][1], 4)
    whole = torch.cat(shards, 1)
    exact = torch.log_softmax(whole.double(), 1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    exact[3] = 0.0
    stats = torch.stack(
        [
            torch.ops.rlsc.log_prob_stats(
                shard.to(placement.device),
                targets.to(placement.device),
                1.0,
                16 * rank,
                16,
                True,
                placement.backend,
            )
            for rank, shard in enumerate(shards)
        ]
    )
    joined = join(stats, 1.0, placement.backend)
    assert torch.equal(joined.log_probs_T.isnan().cpu(), exact.isnan())
    assert torch.equal(joined.entropy_T.isnan().cpu(), exact.isnan())
    for rank in range(3):
        grad = join_backward(stats, rank, 1.0, torch.ones(4, device=placement.device), None)
        assert torch.equal(grad[:, 1].isnan().cpu(), exact.isnan())


def test_a_nan_hidden_state_makes_the_loss_nan(placement: Placement):
    batch = batch_to(make_batch(torch.float32), placement.device)
    batch.hidden[30, 3] = NAN
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    loss, log_p = linear_weighted_loss(
        hidden, weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens, vocab_size=HEAD_VOCAB,
        coefficient_fn=lambda log_p, *_: torch.ones_like(log_p), chunk_tokens=20, backend=placement.backend,
    )  # fmt: skip
    loss.backward()
    assert log_p.isnan().nonzero().tolist() == [[30]]
    assert loss.isnan()
    assert hidden.grad[30].isnan().all()
    assert weight.grad[:HEAD_VOCAB].isnan().all()
