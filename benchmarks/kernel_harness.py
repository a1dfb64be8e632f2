"""Time providers of an op on several cases and relate them to the copy, read and product speed of the run.

A provider whose check fails is reported and not timed. A benchmark that timed nothing raises. The key `ratio`
of a row is the reference provider's time over this provider's: above 1 is faster.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Task, Timing, command_line, device_name, measure, measure_ceilings, save
from benchmarks.roofline import draw

ALLOWED_GRADIENT_ERROR = 0.05  # of the largest element
Checks = dict[str, Any]


class UnavailableError(Exception):
    """A provider cannot take part; the message gives the reason: not installed, wrong device, wrong shape."""


@dataclass
class Row:
    """One line of a table: a provider in one case."""

    case: str
    provider: str
    skipped: str | None = None  # the reason why it was not timed
    checks: Checks = field(default_factory=dict)
    timing: Timing | None = None
    bytes_moved: float = 0.0
    flops: float = 0.0
    percent_of_ceiling: float | None = None
    ratio: float | None = None  # time of the reference / this time


class KernelBenchmark:
    """The options, the ceilings and the rows of a benchmark of one op."""

    def __init__(self, doc: str | None) -> None:
        """Parse the command line and measure the ceilings. `dtype` is bfloat16 on a GPU, float32 on a CPU."""
        self.options = command_line(
            doc,
            device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"),
            full=(False, "all shapes: every model, tensor-parallel size and token count"),
            tiny=(False, "one tiny shape, to try the program"),
            seconds=(float, "seconds per case (default: 3 on a GPU, 1 on a CPU)"),
        )
        self.device = torch.device(self.options.device)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.seconds = self.options.seconds or (3.0 if self.is_cuda else 1.0)
        self.ceilings = measure_ceilings(self.device, self.dtype)
        self.rows: list[Row] = []

    def check(
        self, case: str, builders: Mapping[str, Callable[[], Any]], check: Callable[[str, Any], Checks]
    ) -> dict[str, tuple[Any, Checks]]:
        """Build and check every provider and return those that passed. One that is missing, unsuitable or
        wrong becomes a row with the reason."""
        passed = {}
        for name, build in builders.items():
            try:
                provider = build()
                passed[name] = provider, check(name, provider)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0][:120]
                self.rows.append(Row(case, name, skipped=f"{type(error).__name__}: {reason}"))
        return passed

    def time(
        self,
        case: str,
        tasks: Mapping[str, Task],
        checks: Mapping[str, Checks],
        *,
        flops: float,
        bytes_moved: float = 0.0,
    ) -> None:
        """Time the tasks in turn and add a row for each."""
        for name, timing in measure(tasks, self.device, self.seconds).items():
            self.rows.append(Row(case, name, None, checks.get(name, {}), timing, bytes_moved, flops))

    def finish(
        self, script: str, reference: str, floor_s: Callable[[Row], float], *, plot: bool = False
    ) -> None:
        """Relate the rows to the reference and to the seconds of the floor; write the result; print the
        table."""
        finish(self.rows, reference, floor_s)
        result = {"ceilings": asdict(self.ceilings), "rows": [asdict(row) for row in self.rows]}
        written = [save(script, result, self.device, self.options.out)]
        if plot:
            written += draw(written[0])
        print(table(self.rows, with_times=self.is_cuda))
        print(f"{device_name(self.device)}: {', '.join(map(str, written))}")


def finish(rows: Sequence[Row], reference: str, floor_s: Callable[[Row], float]) -> None:
    """Fill in percentages and ratios; RuntimeError if nothing was timed."""
    timed = {(row.case, row.provider): row.timing.median_ms for row in rows if row.timing is not None}
    if not timed:
        raise RuntimeError(
            "nothing was measured: " + "; ".join(f"{row.provider}: {row.skipped}" for row in rows)
        )
    for row in rows:
        if row.timing is not None:
            row.percent_of_ceiling = 100.0 * 1e3 * floor_s(row) / row.timing.median_ms
            base = timed.get((row.case, reference))
            row.ratio = None if base is None else base / row.timing.median_ms


def table(rows: Iterable[Row], *, with_times: bool) -> str:
    """Format the rows as a Markdown table. On a CPU it has ratios only, because milliseconds depend on the
    other processes of the machine."""
    times = ["ms", "20-80 %", "% of ceiling", "extra MiB"] if with_times else []
    head = ["case", "provider", *times, "x reference", "checks"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if row.timing is None:
            lines.append([row.case, row.provider, *("-" for _ in times), "-", f"not timed: {row.skipped}"])
            continue
        timing, extra = row.timing, row.timing.peak_extra_bytes
        cells = [
            f"{timing.median_ms:.3f}",
            f"{timing.p20_ms:.3f}-{timing.p80_ms:.3f}",
            f"{row.percent_of_ceiling:.0f}",
            "-" if extra is None else f"{extra / 2**20:.0f}",
        ]
        checks = (
            f"{name} {v:.0e}" if isinstance(v, float) else f"{name} {v}" for name, v in row.checks.items()
        )
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append([row.case, row.provider, *(cells if with_times else []), ratio, " ".join(checks)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check_gradients(got: Sequence[Tensor], exact: Sequence[Tensor]) -> Checks:
    """Return the errors of (loss, d hidden, d weight), relative to the largest element; ValueError if a
    gradient is wrong."""
    names = ("loss", "d hidden", "d weight")
    errors = {
        name: float((ours.double() - theirs).abs().max() / theirs.abs().max())
        for name, ours, theirs in zip(names, got, exact, strict=True)
    }
    worst = max(errors["d hidden"], errors["d weight"])
    if not worst <= ALLOWED_GRADIENT_ERROR:
        raise ValueError(f"a gradient is {worst:.2g} of its largest element off float64, allowed 0.05")
    return dict(errors)
