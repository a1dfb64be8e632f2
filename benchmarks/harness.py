"""Shared parts of the benchmarks: options, timing in turn, versions, result files.

A benchmark checks correctness first. Then it times all sides in turn, round after round. Its result is
`results/<device>/<benchmark>[_<variant>].json` with `about` (command, commit, versions, device), the numbers,
and `claims` (see `claims.py`). The key `ratio` compares two sides of one run; the docstring of the benchmark
says which.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import claims
from rlsc_mcore.observability.mismatch import LIMITS

RESULTS = Path(__file__).parent / "results"
# Limit of |trainer - engine| log-prob per token of a step; above it nothing is timed.
MEAN_GAP_LIMIT = {"float32": LIMITS["float32"].stop, "bfloat16": LIMITS["bfloat16"].mean}
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels")
PACKAGES = ("torch", "triton", *PEERS, "megatron-core", "transformer-engine")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Task:
    """A timed call `run`. `prepare` restores the inputs that `run` overwrites and is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Milliseconds of one side."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    peak_extra_bytes: int | None  # device memory beyond what was allocated before; None on a CPU


@dataclass(frozen=True)
class Ceilings:
    """The highest rates of this machine in this run: bytes per second of a copy and of a read, operations per
    second of a bf16 product."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: float


def command_line(
    doc: str | None, *, required: Sequence[str] = (), flags: bool = False, **options: tuple[Any, str]
) -> argparse.Namespace:
    """Parse the options of a benchmark: `name=(default, help)`, and `--out`.

    A type in place of the default is the type of an option without default, a tuple of strings its choices,
    False a switch. With `flags`, unknown arguments are returned as `flags`, for `parse_config`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=not flags
    )
    for name, (default, text) in options.items():
        kind: dict[str, Any] = {"type": type(default), "default": default}
        if default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, tuple):
            kind = {"choices": default}
        elif isinstance(default, type):
            kind = {"type": default}
        elif isinstance(default, Path):
            kind["type"] = Path
        parser.add_argument(f"--{name.replace('_', '-')}", required=name in required, help=text, **kind)
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results/<device>)"
    )
    parsed, parsed_flags = parser.parse_known_args()
    if parsed_flags and not flags:
        parser.error(f"unrecognized arguments: {' '.join(parsed_flags)}")
    parsed.flags = parsed_flags
    return parsed


def refuse(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    sys.exit(2)


def measure(
    tasks: Mapping[str, Task],
    device: torch.device,
    seconds: float,
    fewest: int = 5,
    clock: Clock | None = None,
    warm_ups: int = 2,
) -> dict[str, Timing]:
    """Warm up and time the tasks in turn; see `take_turns`."""
    peaks = {name: _warm_up(task, device, warm_ups) for name, task in tasks.items()}
    times = take_turns(tasks, device, seconds, fewest, clock)
    return {name: _timing(values, peaks[name]) for name, values in times.items()}


def take_turns(
    tasks: Mapping[str, Task],
    device: torch.device,
    seconds: float,
    fewest: int = 5,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Run every task once per round until `seconds` have passed, at least `fewest` rounds, and return the
    milliseconds of each round. Without `clock`, a GPU is timed with events and a CPU with `perf_counter`."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < fewest or time.perf_counter() < end:
        for name, task in tasks.items():
            task.prepare()
            times[name].append(_time_once(task.run, device, clock))
    return times


def process_clock(device: torch.device, world_size: int = 1) -> tuple[Clock | None, str]:
    """Return the clock of a benchmark that works in this process only, and its description. On a CPU it is
    the process's CPU time, so that other processes of a shared machine have no effect."""
    if device.type == "cuda":
        return None, "time"
    return (time.process_time, "CPU time of the process") if world_size == 1 else (time.perf_counter, "time")


def _warm_up(task: Task, device: torch.device, times: int) -> int | None:
    """Run a task untimed (it compiles, tunes, allocates); return the peak of the last run's extra memory."""
    peak = None
    for _ in range(times):
        task.prepare()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        task.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
    return peak


def _time_once(run: Callable[[], Any], device: torch.device, clock: Clock | None) -> float:
    if device.type != "cuda":
        now = clock or time.perf_counter
        start = now()
        run()
        return (now() - start) * 1e3
    torch.cuda.synchronize()
    if clock is not None:
        start = clock()
        run()
        torch.cuda.synchronize()
        return (clock() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def _timing(values: list[float], peak: int | None) -> Timing:
    cuts = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
    return Timing(statistics.median(values), cuts[0], cuts[3], len(values), peak)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure copy, read and matrix product with sizes much larger than the caches (on a CPU: limited, to be
    quick)."""
    numel, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 24, 768)
    source = torch.zeros(numel, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    tasks = {
        "copy": Task(lambda: target.copy_(source)),
        "read": Task(source.view(torch.int32).amax),
        "matmul": Task(lambda: a @ b),
    }
    timings = measure(tasks, device, seconds=1.0)
    amounts = {"copy": 2.0 * source.nbytes, "read": source.nbytes, "matmul": 2.0 * side**3}
    return Ceilings(*(amounts[name] / (timings[name].median_ms * 1e-3) for name in tasks))


def save(
    script: str,
    result: dict[str, Any],
    device: torch.device,
    out: Path | None,
    variant: str = "",
    **facts: Any,
) -> Path:
    """Write the result of the benchmark in the file `script`, with `about` (`facts` are added to it) and
    `claims`, to `out` (default: results/<device>). Return the path."""
    name = Path(script).stem.removeprefix("bench_") + (f"_{variant}" if variant else "")
    path = (out or RESULTS / device_name(device)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about(script, device) | facts, **result}
    content["claims"] = claims.rows(name, content)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def about(script: str, device: torch.device) -> dict[str, Any]:
    """Return command, commit, versions and device of this run. A copy of the sources without git takes the
    commit from RLSC_COMMIT."""
    commit = _git("rev-parse", "HEAD") or os.environ.get("RLSC_COMMIT", "unknown")
    changed = _git("status", "--porcelain", "-uno", "--", "rlsc_mcore", "csrc", "benchmarks/*.py", "setup.py")
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(script).stem}", *sys.argv[1:]]),
        "commit": commit + ("+changes" if changed else ""),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_installed()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
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


def in_process(
    call: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Return `call(*arguments)` from a new process, so that the sides of a comparison share no state. Raises
    RuntimeError if the process ends without a result."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(call, arguments, sender))
    with _environment(environment or {}):
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{call.__name__}: the process ended without a result, see above") from None
    finally:
        process.join()


def _send(call: Callable[..., Any], arguments: Sequence[Any], sender: Any) -> None:
    sender.send(call(*arguments))
    sender.close()
    leave()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def leave() -> NoReturn:
    """End the process without the shutdown of engine threads and process groups, which may block."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
