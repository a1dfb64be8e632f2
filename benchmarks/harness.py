"""Measure providers in one common way: check correctness, then time all providers in turn, round after round,
and relate them to the copy, read and product speed of the same run.

A provider whose check fails is reported and not timed. A benchmark that timed nothing raises. Every result is
a JSON file with the command, the commit and the versions of the run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlsc_mcore.observability.mismatch import LIMITS

RESULTS = Path(__file__).parent / "results"
# Limit of |trainer - engine| log-prob per token of a step; above it nothing is timed.
MEAN_GAP_LIMIT = {"float32": LIMITS["float32"].stop, "bfloat16": LIMITS["bfloat16"].mean}
PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "megatron-core",
    "transformer-engine",
)


class UnavailableError(Exception):
    """A provider cannot take part; the message gives the reason: not installed, wrong device, wrong shape."""


@dataclass(frozen=True)
class Task:
    """A timed call `run`. `prepare` restores the inputs that `run` overwrites and is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Milliseconds of one provider."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    peak_extra_bytes: int | None  # device memory beyond what was allocated before; None on a CPU


@dataclass
class Row:
    """One line of a table: a provider in one case."""

    case: str
    provider: str
    skipped: str | None = None  # the reason why it was not timed
    checks: dict[str, float | bool | str] = field(default_factory=dict)
    timing: Timing | None = None
    bytes_moved: float = 0.0
    flops: float = 0.0
    percent_of_ceiling: float | None = None
    ratio_to_reference: float | None = None  # reference time / this time: above 1 is faster


@dataclass(frozen=True)
class Ceilings:
    """The highest rates of this machine in this run: bytes per second of a copy and of a read, operations per
    second of a bf16 product."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: float


def measure(
    tasks: dict[str, Task],
    device: torch.device,
    seconds: float,
    fewest: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    warm_ups: int = 2,
) -> dict[str, Timing]:
    """Time the tasks in turn, one run of each per round, until `seconds` have passed (at least `fewest`
    rounds).

    `clock` is used on a CPU; a GPU is timed with events.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    peaks: dict[str, int | None] = {}
    for name, task in tasks.items():  # warm up: compile, tune, allocate
        peaks[name] = None
        for _ in range(warm_ups):
            task.prepare()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            task.run()
            _synchronize(device)
            peaks[name] = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < fewest or time.perf_counter() < end:
        for name, task in tasks.items():
            task.prepare()
            times[name].append(_time_once(task.run, device, clock))
    return {name: _timing(values, peaks[name]) for name, values in times.items()}


def _time_once(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        run()
        return (clock() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def _timing(values: list[float], peak: int | None) -> Timing:
    cuts = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
    return Timing(statistics.median(values), cuts[0], cuts[3], len(values), peak)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure copy, read and matrix product with sizes much larger than the caches (on a CPU: limited, to be
    quick)."""
    numel, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 24, 768)
    source = torch.zeros(numel, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    wide = source.view(torch.int32)
    tasks = {
        "copy": Task(lambda: target.copy_(source)),
        "read": Task(wide.amax),
        "matmul": Task(lambda: a @ b),
    }
    timings = measure(tasks, device, seconds=1.0)
    size = source.numel() * source.element_size()

    def rate(amount: float, name: str) -> float:
        return amount / (timings[name].median_ms * 1e-3)

    return Ceilings(rate(2.0 * size, "copy"), rate(size, "read"), rate(2.0 * side**3, "matmul"))


def finish(rows: list[Row], reference: str, *, ceiling_of: Callable[[Row], float | None]) -> None:
    """Fill in percentages and ratios; RuntimeError if nothing was timed."""
    timed = {(row.case, row.provider): row.timing for row in rows if row.timing is not None}
    if not timed:
        raise RuntimeError(
            "nothing was measured: " + "; ".join(f"{row.provider}: {row.skipped}" for row in rows)
        )
    for row in rows:
        if row.timing is None:
            continue
        floor_ms = ceiling_of(row)
        row.percent_of_ceiling = None if floor_ms is None else 100.0 * floor_ms / row.timing.median_ms
        base = timed.get((row.case, reference))
        row.ratio_to_reference = None if base is None else base.median_ms / row.timing.median_ms


def table(rows: Iterable[Row], device: torch.device) -> str:
    """Format the rows as a Markdown table. On a CPU it has ratios only, because milliseconds depend on the
    other processes of the machine."""
    with_times = device.type == "cuda"
    head = [
        "case",
        "provider",
        *(["ms", "20-80 %", "% of ceiling", "extra MiB"] if with_times else []),
        "x reference",
        "checks",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if row.timing is None:
            cells = [
                row.case,
                row.provider,
                *(["-"] * (4 if with_times else 0)),
                "-",
                f"not timed: {row.skipped}",
            ]
        else:
            t = row.timing
            times = [
                f"{t.median_ms:.3f}",
                f"{t.p20_ms:.3f}-{t.p80_ms:.3f}",
                _number(row.percent_of_ceiling, ".0f"),
                _mib(t.peak_extra_bytes),
            ]
            checks = " ".join(
                f"{name} {value:.0e}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.checks.items()
            )
            cells = [
                row.case,
                row.provider,
                *(times if with_times else []),
                _number(row.ratio_to_reference, ".2f"),
                checks,
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def write(name: str, rows: list[Row], ceilings: Ceilings, device: torch.device, folder: Path | None) -> Path:
    """Write rows, ceilings, command and versions to results/<device>/<name>.json and return its path."""
    folder = folder or RESULTS / device_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"about": about(device), "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def about(device: torch.device) -> dict[str, Any]:
    """Return command, commit, versions and device of this run. A copy of the sources without git takes the
    commit from RLSC_COMMIT."""
    module = Path(sys.argv[0]).stem
    commit = _git("rev-parse", "HEAD") or os.environ.get("RLSC_COMMIT", "unknown")
    changed = _git("status", "--porcelain", "-uno", "--", "rlsc_mcore", "csrc", "benchmarks/*.py", "setup.py")
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "commit": commit + ("+changes" if changed else ""),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_installed()},
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)",
        "unix_time": int(time.time()),
    }


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    return run.stdout.strip()


def _installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """Return the name of the folder of a device's results: h200, h100, cpu."""
    if device.type != "cuda":
        return "cpu"
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()


def arguments(description: str) -> argparse.Namespace:
    """Parse the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    parser.add_argument(
        "--full", action="store_true", help="all shapes: every model, tensor-parallel size and token count"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="seconds per case (default: 3 on a GPU, 1 on a CPU)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the result (default: benchmarks/results/<device>)"
    )
    parsed = parser.parse_args()
    parsed.device = torch.device(parsed.device)
    parsed.seconds = parsed.seconds or (3.0 if parsed.device.type == "cuda" else 1.0)
    return parsed
