"""Time weighted, masked token log-probs from logits: `python -m benchmarks.bench_log_prob [--full]`.

Two calls are timed per shape: `forward` (log p alone, one read: floor 2 bytes per logit) and `step` (log p
and the gradient of a sum with non-uniform weights, one read and one write: floor 4 bytes per logit). Inputs
that a provider overwrites are restored between rounds; this is not timed. Two sets of logits are used in
turn, so that no logits are in the cache.
"""

import itertools

import torch
from torch import Tensor

from benchmarks.harness import Task
from benchmarks.kernel_harness import Checks, KernelBenchmark, Row
from benchmarks.log_prob_providers import IGNORED, Provider, providers
from benchmarks.shapes import Shape, shapes

CHECKED_TOKENS = 64
Inputs = tuple[Tensor, Tensor, Tensor]  # logits, targets, weights


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Return logits N(0, 2) with a quarter of the tokens confident, targets (ignored if not trained) and
    weights of both signs."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(shape.num_tokens, shape.num_columns, dtype=dtype, device=device).normal_(
        0.0, 2.0, generator=generator
    )
    targets = torch.randint(0, shape.num_columns, (shape.num_tokens,), device=device, generator=generator)
    confident = torch.arange(shape.num_tokens, device=device) % 4 == 0
    chosen = logits.gather(1, targets[:, None])
    logits.scatter_(1, targets[:, None], torch.where(confident[:, None], chosen + 24, chosen))
    live = torch.arange(shape.num_tokens, device=device) % 16 < round(16 * shape.live_share)
    weights = torch.randn(shape.num_tokens, device=device, generator=generator)
    return logits, torch.where(live, targets, IGNORED), weights


def check(provider: Provider, shape: Shape, device: torch.device, dtype: torch.dtype) -> Checks:
    """Compare a provider with float64 on a few tokens at the real width; ValueError if it is wrong."""
    few = shape._replace(num_tokens=CHECKED_TOKENS)
    logits, targets, weights = make_inputs(few, device, dtype, seed=7)
    live = targets >= 0
    log_p64 = torch.log_softmax(logits.double(), dim=1)
    exact = torch.where(live, log_p64.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)
    checks: Checks = {}

    def relative(got: Tensor, expected: Tensor) -> float:
        return float(((got.double() - expected).abs() / expected.abs().clamp_min(1e-30)).max())

    if provider.step is not None:
        log_p, grad = provider.step(logits.clone(), targets, weights)
        again = provider.step(logits.clone(), targets, weights)
        own = grad.gather(1, targets.clamp_min(0)[:, None])[:, 0]
        own64 = -torch.expm1(exact) * weights
        confident = live & (exact > -1e-3)
        checks["target gradient"] = relative(own[confident], own64[confident])
        checks["masked zero"] = not bool(grad[~live].any())
        checks["repeatable"] = torch.equal(log_p, again[0]) and torch.equal(grad, again[1])
    else:
        assert provider.forward is not None
        log_p = provider.forward(logits.clone(), targets)
    checks["log p"] = float((log_p.double() - exact).abs()[live].max())
    if not checks["log p"] <= provider.tolerance:
        raise ValueError(f"log p is {checks['log p']:.2g} off float64, allowed {provider.tolerance:g}")
    return checks


def task_of(provider: Provider, inputs: list[Inputs], work: Tensor, mode: str) -> Task | None:
    """Return the timed call of a provider, which uses the inputs in turn; None if it has no such call."""
    forward, step = provider.forward, provider.step
    turn = itertools.cycle(inputs)
    current = [inputs[0]]

    def prepare() -> None:
        current[0] = next(turn)
        if mode == "step" and provider.overwrites:
            work.copy_(current[0][0])

    def run_step() -> None:
        logits, targets, weights = current[0]
        step(work if provider.overwrites else logits, targets, weights)

    if mode == "step":
        return None if step is None else Task(run_step, prepare)
    return None if forward is None else Task(lambda: forward(*current[0][:2]), prepare)


def main() -> None:
    """Measure every shape and write results/<device>/log_prob.json with its plot."""
    bench = KernelBenchmark(__doc__)
    for shape in shapes(bench.device.type, bench.options.full, bench.options.tiny):
        inputs = [make_inputs(shape, bench.device, bench.dtype, seed) for seed in range(2)]
        work = torch.empty_like(inputs[0][0])
        passed = bench.check(
            shape.name,
            providers(bench.device),
            lambda _, provider, shape=shape: check(provider, shape, bench.device, bench.dtype),
        )
        checks = {provider.name: found for provider, found in passed.values()}
        for mode, passes in (("forward", shape.live_share), ("step", 1 + shape.live_share)):
            tasks = {provider.name: task_of(provider, inputs, work, mode) for provider, _ in passed.values()}
            bench.time(
                f"{mode} {shape.name}",
                {name: task for name, task in tasks.items() if task is not None},
                checks,
                flops=4.0 * shape.num_tokens * shape.num_columns,
                bytes_moved=passes * work.nbytes,
            )
        del inputs, work

    def floor_s(row: Row) -> float:
        ceilings = bench.ceilings
        is_read = row.case.startswith("forward")
        return row.bytes_moved / (ceilings.read_bytes_per_s if is_read else ceilings.copy_bytes_per_s)

    bench.finish(__file__, "torch eager float32", floor_s, plot=True)


if __name__ == "__main__":
    main()
