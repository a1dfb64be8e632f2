"""What the ops refuse, because the result would be silently wrong or memory of somebody else would be
written."""

import pytest
import torch

from rlsc_mcore.ops import (
    library,  # noqa: F401  registers torch.ops.rlsc
    linear_token_log_probs,
    linear_weighted_loss,
    native,
    sequence_sums,
    token_log_probs,
)
from tests.unit.ops.batches import VOCAB, make
from tests.unit.ops.conftest import Placement

SHARD = (1.0, 0, 7)
OVERWRITING = {
    "rest_softmax_": lambda x, t, b: torch.ops.rlsc.rest_softmax_(x, t, *SHARD, b),
    "log_prob_dlogits_": lambda x, t, b: torch.ops.rlsc.log_prob_dlogits_(
        x, t, torch.ones(len(t), device=x.device), *SHARD, b
    ),
    "dlogits_": lambda x, t, b: torch.ops.rlsc.dlogits_(
        x, torch.ones(len(t), 3, device=x.device), torch.zeros(len(t), 3, device=x.device), t, *SHARD, b
    ),
}


@pytest.mark.parametrize("name", OVERWRITING)
@pytest.mark.parametrize("leaf", [True, False])
def test_logits_that_autograd_tracks_are_not_overwritten(placement: Placement, name, leaf):
    source = torch.randn(4, 8, device=placement.device).requires_grad_()
    logits = source if leaf else source * 1.0
    before, targets = logits.detach().clone(), torch.tensor([0, 3, -1, 6], device=placement.device)
    with pytest.raises(RuntimeError, match=r"requires grad.*torch\.no_grad\(\) or on logits\.detach\(\)"):
        OVERWRITING[name](logits, targets, placement.backend)
    assert torch.equal(logits.detach(), before)
    with torch.no_grad():
        OVERWRITING[name](logits, targets, placement.backend)


@pytest.mark.parametrize("name", OVERWRITING)
def test_overwriting_is_seen_by_autograd_s_version_counter(placement: Placement, name):
    """Another function that saved the logits must not compute its gradient from what replaced them."""
    source = torch.rand(3, 8, device=placement.device).requires_grad_()
    logits = source + 1.0
    other = (logits * logits).sum()
    OVERWRITING[name](logits.detach(), torch.tensor([0, 3, 6], device=placement.device), placement.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("name", OVERWRITING)
@pytest.mark.parametrize("shared", ["expanded", "overlapping"])
def test_rows_that_share_memory_are_not_overwritten(placement: Placement, name, shared):
    row = torch.randn(1, 8, device=placement.device)
    logits = (
        row.expand(4, 8)
        if shared == "expanded"
        else torch.randn(40, device=placement.device).as_strided((4, 8), (5, 1))
    )
    with pytest.raises(ValueError, match="share no memory"):
        OVERWRITING[name](
            logits, torch.zeros(4, dtype=torch.int64, device=placement.device), placement.backend
        )


def test_expanded_rows_may_be_read(placement: Placement):
    row, targets = (
        torch.randn(1, 9, device=placement.device),
        torch.tensor([0, 4, 8], device=placement.device),
    )
    leaf = row.clone().requires_grad_()
    log_p = token_log_probs(leaf.expand(3, 9), targets, vocab_size=9, backend=placement.backend)
    exact = torch.log_softmax(row.double(), 1)[0, targets]
    assert (log_p - exact).abs().max() < 4e-6
    log_p.sum().backward()
    assert (leaf.grad.sum()).abs() < 1e-5


def head_call(name, hidden, weight, batch):
    if name == "linear_token_log_probs":
        return linear_token_log_probs(
            hidden, weight, batch.targets, mask_T=batch.mask, vocab_size=VOCAB
        ).sum()
    return linear_weighted_loss(
        hidden, weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens, vocab_size=VOCAB,
        coefficient_fn=lambda log_p, *_: torch.ones_like(log_p),
    )[0]  # fmt: skip


@pytest.mark.parametrize("changed", ["weight", "hidden"])
def test_a_weight_that_changes_before_backward_is_noticed(changed):
    """linear_token_log_probs recomputes its logits in backward: from other weights the gradient would be
    another's."""
    batch = make(torch.float32)
    hidden, weight = (value.clone().requires_grad_() for value in (batch.hidden, batch.weight))
    log_p = head_call("linear_token_log_probs", hidden, weight, batch)
    with torch.no_grad():
        {"weight": weight, "hidden": hidden}[changed].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_p.backward()


def test_the_loss_has_its_gradient_before_the_weight_can_change():
    batch = make(torch.float32)
    grads = []
    for change in (1.0, 2.0):
        hidden, weight = (value.clone().requires_grad_() for value in (batch.hidden, batch.weight))
        loss = head_call("linear_weighted_loss", hidden, weight, batch)
        with torch.no_grad():
            weight.mul_(change)
        loss.backward()
        grads.append((hidden.grad, weight.grad))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "call", ["token_log_probs", "inplace", "linear_token_log_probs", "linear_weighted_loss"]
)
def test_a_second_derivative_is_refused_in_words(call):
    batch = make(torch.float32)
    hidden, weight = (value.clone().requires_grad_() for value in (batch.hidden, batch.weight))
    if call.startswith("linear"):
        out = head_call(call, hidden, weight, batch)
    else:
        logits = hidden @ weight.t()
        out = token_log_probs(
            logits, batch.targets, vocab_size=VOCAB, inplace_backward=call == "inplace"
        ).sum()
    upstream = torch.ones((), dtype=out.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(out, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out=torch.zeros(4, 8, dtype=torch.bfloat16)), "out: expected the logits' dtype"),
        (dict(out=torch.zeros(4, 9)), "out: expected the logits' dtype and 8 columns"),
        (dict(out=torch.zeros(3, 8)), r"targets: expected contiguous int64 \[3\]"),
        (dict(out=torch.zeros(1, 8).expand(4, 8)), "out: expected rows of 8 columns that share no memory"),
        (dict(stats=torch.zeros(4, 2)), r"stats: expected \[T, 3\] or \[T, 4\]"),
        (dict(stats=torch.zeros(12)), r"stats: expected \[T, 3\] or \[T, 4\], got 1 dims"),
        (dict(stats=torch.zeros(4, 3, dtype=torch.float64)), "stats: expected contiguous float32"),
        (dict(grad_stats=torch.zeros(4, 4)), "grad_stats: expected contiguous float32 with 4 x 3"),
        (dict(grad_stats=torch.zeros(4, 3).bfloat16()), "grad_stats: expected contiguous float32"),
        (dict(targets=torch.zeros(4, dtype=torch.int32)), "targets: expected contiguous int64"),
        (dict(logits=torch.zeros(4, 8, dtype=torch.int32)), "logits: expected float32, bfloat16 or float16"),
        (dict(logits=torch.zeros(32)), r"logits: expected \[T, Vp\], got 1 dims"),
        (dict(num_columns=9), "num_columns: expected 0 to 8, got 9"),
    ],
)
def test_the_compiled_op_checks_every_tensor(change, message):
    """torch.ops.rlsc_native may be called by anyone: a pointer of another type would be read and written as
    this one."""
    arguments = dict(
        grad_stats=torch.zeros(4, 3), stats=torch.zeros(4, 3), logits=torch.zeros(4, 8), targets=torch.zeros(4, dtype=torch.int64),
        out=torch.zeros(4, 8), inv_temperature=1.0, vocab_start=0, num_columns=8,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlsc_native.dlogits(*(arguments | change).values())


def test_tensors_of_different_devices_are_named():
    batch, meta = make(torch.float32), torch.device("meta")
    with pytest.raises(ValueError, match="target_ids_T: expected on meta like logits_TVp, got cpu"):
        token_log_probs(torch.zeros(4, 9, device=meta), torch.zeros(4, dtype=torch.int64), vocab_size=9)
    with pytest.raises(ValueError, match="mask_T: expected on cpu like hidden_TH, got meta"):
        linear_token_log_probs(
            batch.hidden, batch.weight, batch.targets, mask_T=batch.mask.to(meta), vocab_size=VOCAB
        )
    with pytest.raises(ValueError, match="expected on"):
        linear_token_log_probs(
            batch.hidden, batch.weight.to(meta), batch.targets, mask_T=batch.mask, vocab_size=VOCAB
        )
    with pytest.raises(ValueError, match="cu_seqlens: expected on cpu like values_T, got meta"):
        sequence_sums(
            torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.zeros(2, dtype=torch.int32, device=meta)
        )
