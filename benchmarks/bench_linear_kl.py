"""Time the divergence of a student from a teacher over the full vocabulary: `python -m
benchmarks.bench_linear_kl [--full]`.

Timed per shape: forward and backward of the mean of D_t over the trained tokens with the gradients of hidden
states and weight. The floor is the time of the four matrix products that any provider makes (logits of the
student and of the teacher, d hidden, d weight) over the trained tokens, measured as a provider of its own in
the same run. Coefficients are uniform, because Liger has no other. The peers get the rows of the trained
tokens only, as this op takes them itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Task
from benchmarks.kernel_harness import Checks, KernelBenchmark, check_gradients
from benchmarks.shapes import Shape, head_shapes
from rlsc_mcore.ops import linear_kl_loss

CHECKED_TOKENS = 64
BETAS = {"forward KL": 0.0, "JSD": 0.5}
LIGER_CHUNK = {"cuda": 1024, "cpu": 128}  # rows; 1024 is Liger's default


class Inputs(NamedTuple):
    """Hidden states of student and teacher, the shared output weight, and the trained tokens."""

    student: Tensor  # [N, H]
    teacher: Tensor  # [live, H]
    weight: Tensor  # [V, H]
    live: Tensor  # bool [N]
    num_live: int


Loss = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return hidden states whose logits are about N(0, 2), and those of a teacher nearby."""
    generator = torch.Generator(device).manual_seed(3)
    size = shape.num_tokens, shape.hidden_size
    student = torch.randn(size, device=device, generator=generator)
    weight = torch.randn(shape.num_columns, shape.hidden_size, device=device, generator=generator)
    weight *= 2 / shape.hidden_size**0.5
    live = torch.arange(shape.num_tokens, device=device) % 64 >= 64 - round(64 * shape.live_share)
    teacher = student[live]
    teacher = teacher + 0.5 * torch.randn(teacher.shape, device=device, generator=generator)
    return Inputs(
        student.to(dtype).requires_grad_(),
        teacher.to(dtype),
        weight.to(dtype).requires_grad_(),
        live,
        int(live.sum()),
    )


def ours(beta: float, backend: str) -> Loss:
    def loss(x: Inputs) -> Tensor:
        coefficients = torch.full((len(x.live),), 1.0 / x.num_live, device=x.live.device)
        return linear_kl_loss(
            x.student, x.teacher, x.weight, coefficients_T=coefficients, mask_T=x.live, vocab_size=x.weight.shape[0],
            beta=beta, num_live=x.num_live, backend=backend,  # type: ignore[arg-type]
        )[0]  # fmt: skip

    return loss


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the mean divergence of whole rows of logits, by log_softmax and autograd."""
    log_q, log_p = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    if beta == 0:
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p + torch.log(torch.tensor(beta)), log_q + torch.log1p(-torch.tensor(beta)))
    to_teacher = torch.nn.functional.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    return beta * to_teacher + (1 - beta) * torch.nn.functional.kl_div(
        log_m, log_q, log_target=True, reduction="batchmean"
    )


def whole_logits(beta: float) -> Loss:
    def loss(x: Inputs) -> Tensor:
        wide = torch.float64 if x.weight.dtype == torch.float64 else torch.float32
        teacher = x.teacher @ x.weight.detach().t()
        return divergence((x.student[x.live] @ x.weight.t()).to(wide), teacher.to(wide), beta)

    return loss


def liger(beta: float, device: torch.device) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=device.type == "cuda",
        chunk_size=LIGER_CHUNK[device.type],
    )

    def loss(x: Inputs) -> Tensor:
        labels = torch.zeros(x.num_live, dtype=torch.int64, device=x.live.device)
        return fused(x.student[x.live], x.weight, x.teacher, x.weight.detach(), labels)

    return loss


def products(x: Inputs) -> None:
    """Make the four products of the trained tokens, in one chunk, without any work on the rows."""
    student = x.student.detach()[x.live]
    weight = x.weight.detach()
    logits = student @ weight.t()
    torch.mm(x.teacher, weight.t(), out=logits)
    logits @ weight
    logits.t() @ student


def providers(beta: float, device: torch.device) -> dict[str, Callable[[], Loss]]:
    """Return builders by name; a builder that raises is reported."""
    return {
        "ours": lambda: ours(beta, "auto"),
        "whole logits": lambda: whole_logits(beta),
        "Liger fused linear JSD": lambda: liger(beta, device),
    }


def gradients(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d hidden, d weight)."""
    value = loss(inputs)
    grad_hidden, grad_weight = torch.autograd.grad(value, (inputs.student, inputs.weight))
    return value.detach(), grad_hidden, grad_weight


def check(loss: Loss, beta: float, shape: Shape, device: torch.device, dtype: torch.dtype) -> Checks:
    """Compare loss and gradients with float64 on a few tokens; ValueError if a gradient is wrong."""
    few = shape._replace(num_tokens=CHECKED_TOKENS, num_columns=min(shape.num_columns, 20000))
    inputs = make_inputs(few, device, dtype)
    wide = inputs._replace(
        student=inputs.student.detach().double().requires_grad_(),
        teacher=inputs.teacher.double(),
        weight=inputs.weight.detach().double().requires_grad_(),
    )
    return check_gradients(gradients(loss, inputs), gradients(whole_logits(beta), wide))


def main() -> None:
    """Measure every shape and divergence and write results/<device>/linear_kl.json."""
    bench = KernelBenchmark(__doc__)
    device = bench.device
    for shape in head_shapes(device.type, bench.options.full, bench.options.tiny):
        inputs = make_inputs(shape, device, bench.dtype)
        for kind, beta in BETAS.items():
            case = f"{kind}, {shape.name}"

            def check_and_run(
                _: str, loss: Loss, beta: float = beta, shape: Shape = shape, inputs: Inputs = inputs
            ) -> Checks:
                found = check(loss, beta, shape, device, bench.dtype)
                gradients(loss, inputs)  # a peer that runs out of memory at the real size is reported
                return found

            passed = bench.check(case, providers(beta, device), check_and_run)
            tasks = {name: Task(partial(gradients, loss, inputs)) for name, (loss, _) in passed.items()}
            bench.time(
                case,
                {"four products": Task(partial(products, inputs)), **tasks},
                {name: checks for name, (_, checks) in passed.items()},
                flops=8.0 * inputs.num_live * shape.hidden_size * shape.num_columns,
            )
    rate = bench.ceilings.matmul_flops_per_s
    bench.finish(__file__, "four products", lambda row: row.flops / rate)


if __name__ == "__main__":
    main()
