"""Time weighted, masked token log-probs from logits: `python -m benchmarks.bench_log_prob [--full]`.

Two calls are timed per shape: `forward` (log p alone, one read: floor 2 bytes per logit) and `step` (log p
and the gradient of a sum with non-uniform weights, one read and one write: floor 4 bytes per logit). Inputs
that a provider overwrites are restored between rounds; this is not timed. Two sets of logits are used in
turn, so that no logits are in the cache.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Row,
    Task,
    arguments,
    device_name,
    finish,
    measure,
    measure_ceilings,
    table,
    write,
)
from benchmarks.log_prob_providers import IGNORED, Provider, providers
from benchmarks.roofline import draw
from benchmarks.shapes import Shape, shapes

CHECKED_TOKENS = 64


def make_inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
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


def check(provider: Provider, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare a provider with float64 on a few tokens at the real width; ValueError if it is wrong."""
    few = shape._replace(num_tokens=CHECKED_TOKENS)
    logits, targets, weights = make_inputs(few, device, dtype, seed=7)
    live = targets >= 0
    log_p64 = torch.log_softmax(logits.double(), dim=1)
    exact = torch.where(live, log_p64.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)
    checks: dict[str, Any] = {}

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


def tasks_of(
    provider: Provider, inputs: list[tuple[Tensor, Tensor, Tensor]], work: Tensor, mode: str
) -> Task | None:
    """Return the timed call of a provider; it uses the inputs in turn."""
    turn = itertools.cycle(range(len(inputs)))
    current = [0]

    def prepare() -> None:
        current[0] = next(turn)
        if mode == "step" and provider.overwrites:
            work.copy_(inputs[current[0]][0])

    def run() -> None:
        logits, targets, weights = inputs[current[0]]
        if mode == "forward":
            assert provider.forward is not None
            provider.forward(logits, targets)
        else:
            assert provider.step is not None
            provider.step(work if provider.overwrites else logits, targets, weights)

    call: Callable[..., Any] | None = provider.forward if mode == "forward" else provider.step
    return None if call is None else Task(run, prepare)


def main() -> None:
    """Measure every shape and write results/<device>/log_prob.json with its plot."""
    options = arguments(__doc__)
    device: torch.device = options.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(device, dtype)
    rows: list[Row] = []
    for shape in shapes(device.type, options.full):
        inputs = [make_inputs(shape, device, dtype, seed) for seed in range(2)]
        work = torch.empty_like(inputs[0][0])
        built: dict[str, Provider] = {}
        checks: dict[str, dict[str, Any]] = {}
        for name, build in providers(device):
            try:
                provider = build()
                checks[provider.name] = check(provider, shape, device, dtype)
                built[provider.name] = provider
            except Exception as error:  # a missing, unsuitable or wrong peer is reported and not timed
                rows.append(
                    Row(
                        shape.name,
                        name,
                        skipped=f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
                    )
                )
        logits_bytes = shape.num_tokens * shape.num_columns * work.element_size()
        for mode, passes in (("forward", 1 * shape.live_share), ("step", 1 + shape.live_share)):
            tasks = {
                name: task
                for name, provider in built.items()
                if (task := tasks_of(provider, inputs, work, mode)) is not None
            }
            for name, timing in measure(tasks, device, options.seconds).items():
                row = Row(
                    f"{mode} {shape.name}",
                    name,
                    checks=checks[name],
                    timing=timing,
                    bytes_moved=passes * logits_bytes,
                )
                row.flops = 4.0 * shape.num_tokens * shape.num_columns
                rows.append(row)
        del inputs, work

    def ceiling_ms(row: Row) -> float | None:
        rate = ceilings.read_bytes_per_s if row.case.startswith("forward") else ceilings.copy_bytes_per_s
        return 1e3 * row.bytes_moved / rate if row.bytes_moved else None

    finish(rows, "torch eager float32", ceiling_of=ceiling_ms)
    path = write("log_prob", rows, ceilings, device, options.out)
    print(table(rows, device))
    print(f"{device_name(device)}: {path}, {', '.join(str(p) for p in draw(path))}")


if __name__ == "__main__":
    main()
