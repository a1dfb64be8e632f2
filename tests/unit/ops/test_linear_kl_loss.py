"""linear_kl_loss against whole logits, log_softmax and autograd in float64."""

import pytest
import torch

from rlsc_mcore.ops import linear_kl_loss
from rlsc_mcore.ops.reference import join_kl
from tests.unit.ops.batches import HIDDEN, VOCAB, Batch, make, to
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import HEAD_SLACK, assert_close

TEMPERATURE = 0.7
BETAS = [0.0, 0.5, 0.1]
NAN = float("nan")


def teacher_of(batch: Batch, seed: int = 7):
    """Return hidden states of the live tokens and an output weight that differ from the student's."""
    generator = torch.Generator().manual_seed(seed)
    live = batch.hidden[batch.mask]
    hidden = live + 0.5 * torch.randn(live.shape, generator=generator).to(live.dtype)
    weight = batch.weight + 0.1 * torch.randn(batch.weight.shape, generator=generator).to(batch.weight.dtype)
    return hidden.to(live.dtype), weight


def coefficients_of(batch: Batch):
    return torch.linspace(-0.5, 2.0, len(batch.mask), dtype=torch.float64)


def divergence(log_q, log_p, beta):
    """The definition, from whole distributions."""
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(1)
    mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    to_teacher = (log_p.exp() * (log_p - mixture)).sum(1)
    return beta * to_teacher + (1 - beta) * (log_q.exp() * (log_q - mixture)).sum(1)


def whole(batch: Batch, teacher_hidden, teacher_weight, beta, clip=float("inf")):
    """(loss, divergences [T], d hidden, d weight) through all logits at once, in the batch's dtype."""
    hidden, weight = (value.detach().clone().requires_grad_() for value in (batch.hidden, batch.weight))
    logits = hidden[batch.mask] @ weight[:VOCAB].t()
    log_q = torch.log_softmax((logits.float() if logits.dtype != torch.float64 else logits) / TEMPERATURE, 1)
    teacher = (teacher_hidden @ teacher_weight[:VOCAB].t()).to(log_q.dtype)
    value = divergence(log_q, torch.log_softmax(teacher / TEMPERATURE, 1), beta)
    loss = (coefficients_of(batch)[batch.mask] * value.double().clamp(max=clip)).sum()
    loss.backward()
    out = torch.zeros(len(batch.mask), dtype=value.dtype)
    out[batch.mask] = value.detach()
    return [loss.detach(), out, hidden.grad, weight.grad]


def call(batch: Batch, teacher_hidden, teacher_weight, beta, backend="auto", **options):
    return linear_kl_loss(
        batch.hidden, teacher_hidden, batch.weight, coefficients_T=coefficients_of(batch).to(batch.mask.device),
        mask_T=batch.mask, vocab_size=VOCAB, teacher_weight_VpH=teacher_weight, beta=beta, temperature=TEMPERATURE,
        backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_loss_and_gradients_agree_with_float64(placement: Placement, dtype, beta, chunk_tokens):
    batch = make(dtype)
    teacher = teacher_of(batch)
    wide = batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double())
    exact = whole(wide, *(value.double() for value in teacher), beta)
    eager = whole(batch, *teacher, beta)
    here = to(batch, placement.device)
    here.hidden.requires_grad_()
    here.weight.requires_grad_()
    on_device = [value.to(placement.device) for value in teacher]
    loss, values = call(
        here, *on_device, beta, placement.backend, chunk_tokens=chunk_tokens, num_live=int(batch.mask.sum())
    )
    assert loss.dtype == torch.float64
    assert not values.requires_grad
    (3.0 * loss).backward()
    got = [loss, values, here.hidden.grad / 3.0, here.weight.grad / 3.0]
    for name, ours, expected, theirs in zip(
        ("loss", "divergence", "d hidden", "d weight"), got, exact, eager, strict=True
    ):
        slack = (theirs.double() - expected).abs() + 2 * HEAD_SLACK[dtype] * expected.abs().max()
        assert_close(ours, expected, slack, name)
    assert not here.hidden.grad[~here.mask].any()
    assert not here.weight.grad[VOCAB:].any()


@pytest.mark.parametrize("beta", BETAS)
def test_float64_equals_autograd(beta):
    batch = make(torch.float64)
    teacher = teacher_of(batch)
    exact = whole(batch, *teacher, beta)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    loss, values = call(batch._replace(hidden=hidden, weight=weight), *teacher, beta, chunk_tokens=11)
    loss.backward()
    for name, ours, expected in zip(
        ("loss", "divergence", "d hidden", "d weight"),
        [loss, values, hidden.grad, weight.grad],
        exact,
        strict=True,
    ):
        assert_close(ours, expected, 1e-12 * (1 + expected.abs().max()), name)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_equal_to_the_student_has_no_divergence_and_no_gradient(placement: Placement, beta):
    batch = to(make(torch.float32), placement.device)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    same = batch._replace(hidden=hidden, weight=weight)
    loss, values = call(same, batch.hidden[batch.mask], None, beta, placement.backend, chunk_tokens=16)
    loss.backward()
    assert values.abs().max() < 4e-6
    assert hidden.grad.abs().max() < 4e-6 * batch.weight.abs().max() * 10
    assert weight.grad.abs().max() < 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_clipped_token_has_no_gradient(placement: Placement, beta):
    batch = make(torch.float32)
    teacher = teacher_of(batch)
    wide = batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double())
    values = whole(wide, *(value.double() for value in teacher), beta)[1]
    clip = float(values[batch.mask].median())
    exact = whole(wide, *(value.double() for value in teacher), beta, clip)
    here = to(batch, placement.device)
    here.hidden.requires_grad_()
    loss, ours = call(
        here, *(value.to(placement.device) for value in teacher), beta, placement.backend, clip=clip
    )
    loss.backward()
    clipped = values > clip + 1e-5
    assert 10 < int(clipped.sum()) < int(batch.mask.sum())
    assert not here.hidden.grad.cpu()[clipped].any()
    # The median itself lies at the clip: rounding decides whether it has a gradient.
    decided = (values - clip).abs() > 1e-5
    slack = 2e-5 * (1 + exact[2].abs().max())
    assert_close(here.hidden.grad.cpu()[decided], exact[2][decided], slack, "d hidden")
    assert_close(ours, values, 1e-5 * (1 + values.abs()), "divergences are not clipped")
    assert_close(loss, exact[0], 1e-4 * (1 + exact[0].abs()), "loss")


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("vocab", [37, 5003])
def test_confident_teachers_and_large_offsets(placement: Placement, beta, vocab):
    """Probabilities of 0 and 1 in float32, and rows whose logits share an offset of thousands; rows of one
    block and of several."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 6, vocab, generator=generator, dtype=torch.float64)
    student[5] += torch.linspace(-3.0, 3.0, vocab)  # the running maximum of later blocks grows
    student[1, 5] += 200.0
    teacher[2] += 4096.0
    student[3] -= 4096.0
    teacher[4, 7:] = float("-inf")
    teacher[0, : vocab // 2] = float("-inf")
    teacher[0, vocab - 3] += 200.0
    student, teacher = student.float().double(), teacher.float().double()
    value = divergence(torch.log_softmax(student, 1), torch.log_softmax(teacher, 1).clamp_min(-1e300), beta)
    leaf = student.clone().requires_grad_()
    divergence(
        torch.log_softmax(leaf, 1), torch.log_softmax(teacher, 1).clamp_min(-1e300), beta
    ).sum().backward()
    x, y = student.float().to(placement.device), teacher.float().to(placement.device)
    stats = torch.ops.rlsc.kl_stats(x, y, 1.0, vocab, placement.backend)
    norms, got = join_kl(stats[None], 1.0)
    student_kl = torch.zeros_like(got)
    if beta:
        sums = torch.ops.rlsc.jsd_stats(x, y, norms, 1.0, vocab, beta, placement.backend)
        student_kl, got = sums[:, 0], (1 - beta) * sums[:, 0] + beta * sums[:, 1]
    torch.ops.rlsc.kl_dlogits_(
        x, y, norms, torch.ones_like(got), student_kl, 1.0, vocab, beta, placement.backend
    )
    assert_close(got, value, 4e-6 * (1 + value.abs()), "divergence")
    assert_close(x, leaf.grad, 2e-6, "gradient")


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("spoil", [NAN, float("inf")])
def test_nan_stays_nan(placement: Placement, side, beta, spoil):
    batch = make(torch.float32)
    teacher = list(teacher_of(batch))
    live = batch.mask.nonzero()[:, 0]
    spoiled = 20
    if side == "student":
        batch.hidden[live[spoiled], 3] = spoil
    else:
        teacher[0][spoiled, 3] = spoil
    here = to(batch, placement.device)
    here.hidden.requires_grad_()
    loss, values = call(
        here,
        *(value.to(placement.device) for value in teacher),
        beta,
        placement.backend,
        chunk_tokens=16,
    )
    loss.backward()
    assert values.isnan().nonzero().tolist() == [[int(live[spoiled])]]
    assert loss.isnan()
    assert here.hidden.grad[live[spoiled]].isnan().all()
    assert here.hidden.grad[live[spoiled - 1]].isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_empty_batch_and_a_fully_masked_one(placement: Placement, beta):
    batch = to(make(torch.float32), placement.device)
    for tokens in (0, len(batch.mask)):
        hidden = batch.hidden[:tokens].clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        loss, values = linear_kl_loss(
            hidden, batch.hidden[:0], weight, coefficients_T=torch.ones(tokens, device=hidden.device),
            mask_T=torch.zeros(tokens, dtype=torch.bool, device=hidden.device), vocab_size=VOCAB, beta=beta,
            backend=placement.backend,
        )  # fmt: skip
        loss.backward()
        assert loss == 0
        assert values.shape == (tokens,)
        assert not values.any()
        assert hidden.grad.shape == (tokens, HIDDEN)
        assert not hidden.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("unit_upstream", [False, True])
def test_the_weight_gradient_goes_to_megatrons_main_grad(tied, unit_upstream):
    batch = make(torch.bfloat16)
    teacher = teacher_of(batch)
    expected = whole(batch, *teacher, 0.0)[3]
    weight = torch.nn.Parameter(batch.weight)
    weight.main_grad = torch.full(weight.shape, 2.0)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    batch.hidden.requires_grad_()
    call(batch._replace(weight=weight), *teacher, 0.0, unit_upstream=unit_upstream)[0].backward()
    assert weight.grad_added_to_main_grad is True
    slack = 2 * HEAD_SLACK[torch.bfloat16] * expected.double().abs().max()
    assert_close(weight.main_grad - 2.0, expected, slack, "main_grad")
    assert not tied or not weight.grad.any()


def test_float32_logits_of_bfloat16_operands_are_closer_to_float64(placement: Placement):
    batch = make(torch.bfloat16)
    teacher = teacher_of(batch)
    wide = batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double())
    exact = whole(wide, *(value.double() for value in teacher), 0.0)[1]
    here = to(batch, placement.device)
    on_device = [value.to(placement.device) for value in teacher]
    errors = [
        (call(here, *on_device, 0.0, placement.backend, logits_dtype=dtype)[1].cpu() - exact).abs().max()
        for dtype in (None, torch.float32)
    ]
    assert errors[1] < 1e-4 < errors[0]


def test_memory_of_the_logits_is_that_of_the_chunks():
    """The largest tensor that autograd or the caller sees is no [T, V] matrix."""
    batch, seen = make(torch.float32), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                value.shape
                for value in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] >= VOCAB
            )
            return out

    with Sizes():
        call(batch._replace(hidden=batch.hidden.requires_grad_()), *teacher_of(batch), 0.5, chunk_tokens=8)
    logits = [shape for shape in seen if shape[0] != HIDDEN]  # without transposed weights
    assert max(shape[0] for shape in logits) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=1.0), "beta: expected 0"),
        (dict(beta=-0.1), "beta: expected 0"),
        (dict(clip=0.0), "clip: expected more than 0"),
        (dict(coefficients_T=torch.ones(3)), r"coefficients_T: expected \[64\]"),
        (dict(hidden_teacher_NH=torch.ones(3, HIDDEN)), r"hidden_teacher_NH: expected \[46, 32\]"),
        (dict(teacher_weight_VpH=torch.ones(3, HIDDEN)), r"teacher_weight_VpH: expected \[224, 32\]"),
        (dict(temperature=0.0), "temperature: expected more than 0"),
    ],
)
def test_arguments_that_do_not_match_are_refused(change, message):
    batch = make(torch.float32)
    arguments = dict(
        hidden_student_TH=batch.hidden,
        hidden_teacher_NH=batch.hidden[batch.mask],
        weight_VpH=batch.weight,
        coefficients_T=torch.ones(len(batch.mask)),
        mask_T=batch.mask,
        vocab_size=VOCAB,
    )
    with pytest.raises(ValueError, match=message):
        linear_kl_loss(**(arguments | change))


def test_logits_that_autograd_tracks_are_not_overwritten(placement: Placement):
    student = torch.randn(4, 8, device=placement.device).requires_grad_()
    before = student.detach().clone()
    with pytest.raises(RuntimeError, match="requires grad"):
        torch.ops.rlsc.kl_dlogits_(
            student, torch.randn(4, 8, device=placement.device), torch.zeros(4, 4, device=placement.device),
            torch.ones(4, device=placement.device), torch.zeros(4, device=placement.device), 1.0, 8, 0.0,
            placement.backend,
        )  # fmt: skip
    assert torch.equal(student.detach(), before)
