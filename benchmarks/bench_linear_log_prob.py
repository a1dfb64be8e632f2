"""Time the output head and the weighted loss without storing all logits: `python -m
benchmarks.bench_linear_log_prob [--full]`.

Timed per shape: forward and backward of -sum_t c_t log p_t with non-uniform c_t and both gradients. The floor
is the time of three matrix products (forward, d hidden, d weight) over the trained tokens, at the rate of a
bf16 product in the same run. This engine computes c_t from the log p of the same pass; the peers get c_t as
an input, which is less work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Task
from benchmarks.kernel_harness import Checks, KernelBenchmark, check_gradients
from benchmarks.log_prob_providers import IGNORED
from benchmarks.shapes import Shape, head_shapes
from rlsc_mcore.ops import linear_token_log_probs, linear_weighted_loss

CHECKED_TOKENS = 64
SEQUENCE_TOKENS = 1024


class Inputs(NamedTuple):
    """A packed batch, its coefficients, and the tensors that receive gradients."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # int64 [N], IGNORED where not trained
    coefficients: Tensor  # float32 [N], 0 where not trained
    cu_seqlens: Tensor
    live_counts: list[int]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return hidden states and a weight whose logits are about N(0, 2)."""
    generator = torch.Generator(device).manual_seed(3)
    hidden = torch.randn(shape.num_tokens, shape.hidden_size, device=device, generator=generator).to(dtype)
    weight = (
        torch.randn(shape.num_columns, shape.hidden_size, device=device, generator=generator)
        * 2
        / shape.hidden_size**0.5
    ).to(dtype)
    targets = torch.randint(0, shape.num_columns, (shape.num_tokens,), device=device, generator=generator)
    length = min(SEQUENCE_TOKENS, shape.num_tokens)
    first_live = length - round(length * shape.live_share)
    live = torch.arange(shape.num_tokens, device=device) % length >= first_live
    coefficients = torch.rand(shape.num_tokens, device=device, generator=generator) * live / shape.num_tokens
    cu_seqlens = torch.arange(0, shape.num_tokens + 1, length, device=device, dtype=torch.int32)
    counts = [length - first_live] * (shape.num_tokens // length)
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.where(live, targets, IGNORED),
        coefficients,
        cu_seqlens,
        counts,
    )


Loss = Callable[[Inputs], Tensor]


def ours(backend: str, device: torch.device) -> Loss:
    def loss(x: Inputs) -> Tensor:
        live = x.targets >= 0
        kept = x.coefficients[torch.argsort(live.logical_not().to(torch.uint8), stable=True)]

        def coefficients(log_p: Tensor, mask: Tensor, cu_seqlens: Tensor, sequences: slice) -> Tensor:
            start = sum(x.live_counts[: sequences.start])
            return kept[start : start + log_p.shape[0]]

        return linear_weighted_loss(
            x.hidden, x.weight, x.targets.clamp_min(0), mask_T=live, cu_seqlens=x.cu_seqlens, coefficient_fn=coefficients,
            vocab_size=x.weight.shape[0], live_counts=x.live_counts, backend=backend,  # type: ignore[arg-type]
        )[0]  # fmt: skip

    return loss


def ours_recompute(backend: str) -> Loss:
    def loss(x: Inputs) -> Tensor:
        live = x.targets >= 0
        log_p = linear_token_log_probs(
            x.hidden, x.weight, x.targets.clamp_min(0), mask_T=live, vocab_size=x.weight.shape[0], num_live=sum(x.live_counts),
            backend=backend,  # type: ignore[arg-type]
        )  # fmt: skip
        return -(x.coefficients * log_p).sum()

    return loss


def whole_logits(x: Inputs) -> Tensor:
    losses = torch.nn.functional.cross_entropy(
        (x.hidden @ x.weight.t()).float(), x.targets, reduction="none", ignore_index=IGNORED
    )
    return (x.coefficients * losses).sum()


def torch_chunked() -> Loss:
    fused: Any = torch.nn.functional.linear_cross_entropy  # torch 2.12 and later
    return lambda x: (
        x.coefficients * fused(x.hidden, x.weight, x.targets, reduction="none", ignore_index=IGNORED)
    ).sum()


def liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(x: Inputs) -> Tensor:
        result: Any = liger_fused_linear_cross_entropy(
            x.hidden, x.weight, x.targets, reduction="none", ignore_index=IGNORED
        )
        return (x.coefficients * (result[0] if isinstance(result, tuple) else result)).sum()

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x: (
        x.coefficients
        * linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none", ignore_index=IGNORED)
    ).sum()


def quack_unweighted() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: chunked_linear_cross_entropy(
        x.hidden, x.weight, x.targets, ignore_index=IGNORED, reduction="sum"
    )


def providers(device: torch.device) -> dict[str, Callable[[], Loss]]:
    """Return builders by name; a builder that raises is reported."""
    return {
        "ours": lambda: ours("auto", device),
        "ours, recomputed": lambda: ours_recompute("auto"),
        "ours reference": lambda: ours("reference", device),
        "whole logits": lambda: whole_logits,
        "F.linear_cross_entropy": torch_chunked,
        "Liger": liger,
        "cut-cross-entropy": cut_cross_entropy,
        "QuACK (unweighted)": quack_unweighted,
    }


def gradients(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d hidden, d weight)."""
    value = loss(inputs)
    grad_hidden, grad_weight = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
    return value.detach(), grad_hidden, grad_weight


def check(name: str, loss: Loss, shape: Shape, device: torch.device, dtype: torch.dtype) -> Checks:
    """Compare both gradients with float64 on a few tokens; ValueError if they are wrong."""
    few = shape._replace(num_tokens=CHECKED_TOKENS, num_columns=min(shape.num_columns, 20000))
    inputs = make_inputs(few, device, dtype)
    if name.endswith("(unweighted)"):
        inputs = inputs._replace(coefficients=(inputs.targets >= 0).float())
    wide = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
    )
    exact = gradients(_float64_loss, wide)
    got, again = gradients(loss, inputs), gradients(loss, inputs)
    checks = check_gradients(got, exact)
    checks["repeatable"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return checks


def _float64_loss(x: Inputs) -> Tensor:
    losses = torch.nn.functional.cross_entropy(
        x.hidden @ x.weight.t(), x.targets, reduction="none", ignore_index=IGNORED
    )
    return (x.coefficients * losses).sum()


def main() -> None:
    """Measure every shape and write results/<device>/linear_log_prob.json with its plot."""
    bench = KernelBenchmark(__doc__)
    for shape in head_shapes(bench.device.type, bench.options.full, bench.options.tiny):
        inputs = make_inputs(shape, bench.device, bench.dtype)

        def check_and_run(name: str, loss: Loss, shape: Shape = shape, inputs: Inputs = inputs) -> Checks:
            found = check(name, loss, shape, bench.device, bench.dtype)
            gradients(loss, inputs)  # a peer that runs out of memory at the real size is reported
            return found

        passed = bench.check(shape.name, providers(bench.device), check_and_run)
        live, size = sum(inputs.live_counts), inputs.hidden.element_size()
        width, columns = shape.hidden_size, shape.num_columns
        bench.time(
            shape.name,
            {name: Task(partial(gradients, loss, inputs)) for name, (loss, _) in passed.items()},
            {name: checks for name, (_, checks) in passed.items()},
            flops=6.0 * live * width * columns,
            bytes_moved=2.0 * size * (live + columns) * width + 4.0 * columns * width,
        )
    rate = bench.ceilings.matmul_flops_per_s
    bench.finish(__file__, "whole logits", lambda row: row.flops / rate, plot=True)


if __name__ == "__main__":
    main()
