"""token_log_probs against log_softmax in float64: values and every gradient, on every backend."""

import pytest
import torch

from rlsc_mcore.ops import token_log_probs
from tests.unit.ops import oracle
from tests.unit.ops.conftest import Placement
from tests.unit.ops.rows import COLUMNS, IGNORED, VOCAB, make, to
from tests.unit.ops.tolerances import CONFIDENT, assert_close, gradient_allowance, value_allowance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(rows, placement, *, temperature=1.0, with_entropy=True, **options):
    """(log p, entropy, gradient of the weighted sum) of an op call."""
    leaf = rows.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = token_log_probs(
        leaf,
        rows.targets,
        temperature=temperature,
        vocab_size=VOCAB,
        with_entropy=with_entropy,
        backend=placement.backend,
        **options,
    )
    log_p, entropy = out if with_entropy else (out, torch.zeros_like(out))
    (log_p * rows.weights + entropy * rows.entropy_weights).sum().backward()
    return log_p.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("extreme", [False, True])
def test_values_and_gradients_agree_with_float64(
    placement: Placement, dtype, temperature, with_entropy, extreme
):
    cpu_rows = make(dtype, extreme=extreme)
    if not with_entropy:
        cpu_rows = cpu_rows._replace(entropy_weights=torch.zeros_like(cpu_rows.entropy_weights))
    # the entropy of a row whose target is impossible is fine, the gradient of log p = -inf is not asked for
    if extreme:
        cpu_rows.weights[12] = 0.0
    rows = to(cpu_rows, placement.device)
    options = dict(temperature=temperature, vocab_size=VOCAB)
    exact = oracle.log_probs_and_entropy(cpu_rows.logits.double(), cpu_rows.targets, **options)
    eager = oracle.log_probs_and_entropy(cpu_rows.logits, cpu_rows.targets, **options)
    log_p, entropy, grad = run(rows, placement, temperature=temperature, with_entropy=with_entropy)
    assert_close(log_p, exact[0], value_allowance(eager[0], exact[0]), "log p")
    if with_entropy:
        assert_close(entropy, exact[1], value_allowance(eager[1], exact[1]), "entropy")
    exact_grad = float64_gradient(cpu_rows, temperature)
    largest = float(cpu_rows.weights.abs().max() + cpu_rows.entropy_weights.abs().max()) / temperature
    allowed = gradient_allowance(exact_grad, dtype, largest)
    if extreme or with_entropy:  # where x - lse is large, one rounding of it moves p by |x - lse| * 2^-24
        allowed = allowed + 2e-6 * largest + 8e-6 * exact_grad.abs()
    assert_close(grad[:, :VOCAB], exact_grad, allowed, "gradient")


def float64_gradient(rows, temperature):
    """d/dx of sum w log p + v H, written out: w (1[target] - p) - v p (log p + H)."""
    x = rows.logits[:, :VOCAB].double() / temperature
    log_p = torch.log_softmax(x, dim=1)
    p = log_p.exp()
    finite = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * finite).sum(dim=1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(rows.targets.clamp_min(0), VOCAB)
    grad = rows.weights[:, None].double() * (one_hot - p) - rows.entropy_weights[:, None].double() * p * (
        finite + entropy
    )
    return torch.where((rows.targets >= 0)[:, None], grad / temperature, 0.0)


def test_the_written_gradient_is_autograd_of_the_oracle():
    rows = make(torch.float32)
    _, _, grad = oracle.gradient(
        rows.logits[:, :VOCAB].double(),
        rows.targets,
        rows.weights,
        rows.entropy_weights,
        temperature=0.7,
        vocab_size=VOCAB,
    )
    assert_close(float64_gradient(rows, 0.7), grad, 1e-13, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_and_padding_columns_are_bitwise_zero(placement: Placement, dtype):
    rows = to(make(dtype), placement.device)
    log_p, entropy, grad = run(rows, placement)
    ignored = rows.targets == IGNORED
    assert int(ignored.sum()) == 2
    for value in (log_p[ignored], entropy[ignored], grad[ignored], grad[:, VOCAB:]):
        bits = value.contiguous().view(torch.int16 if value.element_size() == 2 else torch.int32)
        assert not bits.any(), "expected +0 everywhere"
    assert grad[~ignored][:, :VOCAB].isfinite().all()


@pytest.mark.parametrize("row_stride", [COLUMNS + 8, COLUMNS + 3])
def test_rows_with_a_stride_give_the_same_bits(placement: Placement, row_stride):
    packed, strided = make(torch.bfloat16), make(torch.bfloat16, row_stride=row_stride)
    ours, theirs = (run(to(rows, placement.device), placement) for rows in (packed, strided))
    for name, a, b in zip(("log p", "entropy", "gradient"), ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@pytest.mark.parametrize("gap", [16.1181, 12.0, 8.0])
def test_a_confident_token_keeps_its_digits(placement: Placement, gap):
    """p = 1 - 1e-7 and around: lse - x_t cancels there, 1 - p must not (RLSC lives at p -> 1)."""
    logits = torch.full((1, VOCAB), -gap - 6.94312, dtype=torch.float32)
    logits[0, 700] = 0.0
    exact = torch.log_softmax(logits.double(), dim=1)[0, 700]
    leaf = logits.to(placement.device).requires_grad_()
    log_p = token_log_probs(
        leaf, torch.tensor([700], device=placement.device), vocab_size=VOCAB, backend=placement.backend
    )
    log_p.sum().backward()
    assert_close(log_p[0] / exact, torch.tensor(1.0), CONFIDENT, "log p / exact")
    assert_close(
        leaf.grad[0, 700] / -torch.expm1(exact), torch.tensor(1.0), CONFIDENT, "target gradient / exact"
    )


def test_plain_log_softmax_fails_the_confident_test():
    """Why the statistics leave the target out: float32 log_softmax is tens of percent off there."""
    logits = torch.full((1, VOCAB), -16.1181 - 6.94312)
    logits[0, 700] = 0.0
    exact = torch.log_softmax(logits.double(), dim=1)[0, 700]
    assert abs(float(torch.log_softmax(logits, dim=1)[0, 700] / exact) - 1) > 10 * CONFIDENT


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_writes_the_same_gradient_over_the_logits(placement: Placement, dtype):
    rows = to(make(dtype), placement.device)
    _, _, expected = run(rows, placement)
    source = rows.logits.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = source * 1.0
    log_p, entropy = token_log_probs(
        logits,
        rows.targets,
        vocab_size=VOCAB,
        with_entropy=True,
        inplace_backward=True,
        backend=placement.backend,
    )
    (log_p * rows.weights + entropy * rows.entropy_weights).sum().backward()
    assert torch.equal(logits.detach(), expected), "the logits hold their gradient"
    assert torch.equal(source.grad, expected)


def test_two_runs_agree_bit_for_bit(placement: Placement):
    rows = to(make(torch.bfloat16), placement.device)
    for first, second in zip(run(rows, placement), run(rows, placement), strict=True):
        assert torch.equal(first, second)


def test_uninitialised_outputs_are_written_completely(placement: Placement):
    """torch.empty filled with NaN: what an op forgets to write shows."""
    rows = to(make(torch.float32), placement.device)
    expected = run(rows, placement)
    torch.use_deterministic_algorithms(True)
    try:
        got = run(rows, placement)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(placement: Placement, num_rows):
    logits = torch.randn(num_rows, VOCAB).to(placement.device).requires_grad_()
    targets = torch.zeros(num_rows, dtype=torch.int64, device=placement.device)
    log_p = token_log_probs(logits, targets, vocab_size=VOCAB, backend=placement.backend)
    log_p.sum().backward()
    assert_close(log_p, torch.log_softmax(logits.double(), 1)[:, 0], 4e-6, "log p")
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("vocab", [1, 2, 7, 151936])
def test_vocabulary_sizes(placement: Placement, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator) * 4
    targets = torch.tensor([0, vocab - 1, vocab // 2])
    exact = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0]
    got = token_log_probs(
        logits.to(placement.device), targets.to(placement.device), vocab_size=vocab, backend=placement.backend
    )
    assert_close(got, exact, value_allowance(exact, exact), "log p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=0.0), "temperature: expected more than 0"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(target_ids_T=torch.zeros(3, dtype=torch.int64)), r"target_ids_T: expected int64 \[4\]"),
        (dict(target_ids_T=torch.zeros(4, dtype=torch.int32)), "target_ids_T: expected int64"),
        (dict(target_ids_T=torch.full((4,), 9)), "target_ids_T: expected ids below vocab_size 9, got 9"),
        (dict(logits_TVp=torch.zeros(9, 4).t()), "contiguous rows"),
        (dict(logits_TVp=torch.zeros(4, 9, dtype=torch.int32)), "logits_TVp: expected"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = (
        dict(logits_TVp=torch.zeros(4, 9), target_ids_T=torch.zeros(4, dtype=torch.int64), vocab_size=9)
        | change
    )
    with pytest.raises(ValueError, match=message):
        token_log_probs(arguments.pop("logits_TVp"), arguments.pop("target_ids_T"), **arguments)
