"""Float32 logits of bfloat16 operands: log p as exact as float32, gradients as exact as bfloat16 operands let
them be."""

import pytest
import torch

from rlsc_mcore.ops import linear_token_log_probs, linear_weighted_loss
from rlsc_mcore.ops.chunks import default_chunk_tokens
from rlsc_mcore.ops.head import COLUMNS_AT_ONCE, head_product
from tests.unit.ops import oracle
from tests.unit.ops.batches import VOCAB, make, to
from tests.unit.ops.conftest import Placement
from tests.unit.ops.rows import COLUMNS
from tests.unit.ops.rows import VOCAB as ROW_VOCAB
from tests.unit.ops.rows import make as make_rows
from tests.unit.ops.rows import to as rows_to
from tests.unit.ops.tolerances import HEAD_SLACK, assert_close, gradient_allowance

HALF = [torch.bfloat16, torch.float16]


def ones(log_p, *_):
    return torch.ones_like(log_p)


def run(call, batch, backend, **options):
    """(log p, d hidden, d weight) of the sum of log p."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    options |= dict(mask_T=batch.mask, vocab_size=VOCAB, temperature=0.7, backend=backend)
    if call is linear_token_log_probs:
        log_p = call(hidden, weight, batch.targets, **options)
        log_p.sum().backward()
    else:
        loss, log_p = call(
            hidden, weight, batch.targets, cu_seqlens=batch.cu_seqlens, coefficient_fn=ones, **options
        )
        (-loss).backward()
    return log_p.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_tokens", [7, 64])  # a sequence in pieces, and all in one chunk
@pytest.mark.parametrize("call", [linear_token_log_probs, linear_weighted_loss])
def test_log_p_is_exact_and_gradients_are_those_of_the_operands_type(
    placement: Placement, dtype, chunk_tokens, call
):
    batch = make(torch.float32)
    batch = batch._replace(hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype))
    hidden, weight = batch.hidden.double().requires_grad_(), batch.weight.double().requires_grad_()
    exact = oracle.head_log_probs(
        hidden, weight, batch.targets, batch.mask, temperature=0.7, vocab_size=VOCAB
    )
    exact.sum().backward()
    here = to(batch, placement.device)
    log_p, grad_hidden, grad_weight = run(
        call, here, placement.backend, chunk_tokens=chunk_tokens, logits_dtype=torch.float32
    )
    rounded, *_ = run(call, here, placement.backend, chunk_tokens=chunk_tokens)
    error = (log_p.cpu().double() - exact).abs().max()
    assert error < 2e-5
    assert (rounded.cpu().double() - exact).abs().max() > 50 * error, (
        "the test's logits no longer show the difference"
    )
    slack = 4 * HEAD_SLACK[torch.bfloat16]
    assert grad_hidden.dtype == grad_weight.dtype == dtype
    for name, got, expected in (
        ("d hidden", grad_hidden, hidden.grad),
        ("d weight", grad_weight, weight.grad),
    ):
        assert_close(got, expected, slack * expected.abs().max(), name)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_rest_softmax_in_another_type(placement: Placement, dtype):
    rows = rows_to(make_rows(torch.float32), placement.device)
    expected, arguments = rows.logits.clone(), (rows.targets, 1 / 0.7, 0, ROW_VOCAB, placement.backend)
    stats = torch.ops.rlsc.rest_softmax_(expected, *arguments)
    out = torch.full((rows.logits.shape[0], COLUMNS), 7.0, dtype=dtype, device=placement.device)
    got = torch.ops.rlsc.rest_softmax_into(rows.logits.clone(), out, *arguments)
    assert torch.equal(got.nan_to_num(), stats.nan_to_num())
    assert_close(out, expected, gradient_allowance(expected, dtype, 1.0) + 1e-6, "rest softmax")


def test_the_product_is_not_rounded_and_is_cut_by_columns():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=generator).bfloat16()
    weight = torch.randn(2 * COLUMNS_AT_ONCE + 5, 16, generator=generator).bfloat16()
    logits = head_product(hidden, weight, torch.full((3, weight.shape[0]), float("nan")))
    assert_close(logits, hidden.double() @ weight.double().t(), 1e-5, "logits")


def test_the_workspace_holds_both_types():
    cpu = torch.device("cpu")
    assert default_chunk_tokens(cpu, 152064, 6) == default_chunk_tokens(cpu, 152064, 2) // 3


@pytest.mark.parametrize("call", [linear_token_log_probs, linear_weighted_loss])
def test_another_type_is_refused(call):
    batch = make(torch.bfloat16)
    with pytest.raises(
        ValueError,
        match=r"logits_dtype: expected torch\.bfloat16 like hidden_TH, or float32, got torch\.float16",
    ):
        run(call, batch, "auto", logits_dtype=torch.float16)
