"""Tell how far work is: lines at regular times for an output that is no terminal, and the state of a run
from its files. Imports no torch."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlsc_mcore.run.files import row_from_json
from rlsc_mcore.run.folder import METRICS_FILE
from rlsc_mcore.run.status import read_status

SECONDS_VARIABLE = "RLSC_PROGRESS_SECONDS"
"""Environment variable: seconds between two progress lines; default 30."""

RECENT_STEPS = 5
TAIL_BYTES = 1 << 20  # number of bytes that are read from the end of metrics.jsonl


class Counter:
    """Count finished units of work, and their tokens if they have any."""

    def __init__(self, description: str, total: int = 0, tokens_each: float = 0.0) -> None:
        """`total` is the number of units, 0 if it is not known; `tokens_each` the mean tokens of a unit."""
        self.description, self.total, self.tokens_each = description, total, tokens_each
        self.done, self.tokens = 0, 0.0
        self._start = time.monotonic()

    def advance(self, amount: int, tokens: int | None = None) -> None:
        """Add `amount` finished units; they have `tokens` tokens, or `tokens_each` each."""
        self.done += amount
        self.tokens += amount * self.tokens_each if tokens is None else tokens

    def line(self) -> str:
        """Return what is done, what is left, the tokens per second if tokens were counted, and the time left
        at the present speed."""
        seconds = max(1e-9, time.monotonic() - self._start)
        left = max(0, self.total - self.done)
        parts = [f"{self.done} of {self.total} done, {left} left"] if self.total else []
        if self.tokens:
            parts.append(f"{self.tokens / seconds:.0f} tokens/s")
        parts.append(f"for {duration(seconds)}")
        if self.total and self.done:
            parts.append(f"about {duration(seconds * left / self.done)} to go")
        return f"{self.description}: {', '.join(parts)}"


@contextmanager
def regular_lines(line: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """Call `say(line())` every 30 seconds (RLSC_PROGRESS_SECONDS) inside the block, in another thread.

    Work that ends sooner prints nothing.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_seconds_between()):
            say(line())

    thread = threading.Thread(target=run, name="rlsc-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _seconds_between() -> float:
    try:
        seconds = float(os.environ.get(SECONDS_VARIABLE, "30"))
    except ValueError:
        seconds = 0.0
    return seconds if seconds > 0 else 30.0


def run_line(run_dir: Path, name: str) -> str:
    """Return one line about a run that another process trains: phase, steps done and left, tokens/s."""
    status = read_status(run_dir) or {}
    if status.get("state") != "running":
        return f"{name}: starting"
    rows = last_metrics(run_dir)
    step, num_steps = int(status.get("steps_done", 0)), int(status.get("num_steps") or 0)
    parts = [f"{status.get('phase')}, step {step} of {num_steps} done, {max(0, num_steps - step)} left"]
    if rows:
        rates = (f"{rows[-1][key]:.0f}" for key in ("rollout_tokens_per_s", "train_tokens_per_s"))
        parts.append("rollout {} and training {} tokens/s".format(*rates))
    left = seconds_left(rows, num_steps, step)
    if left is not None:
        parts.append(f"about {duration(left)} of training to go")
    return f"{name}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Format a duration: 42 s, 7 min, 3 h 20 min."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def last_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the last rows of metrics.jsonl (its last 1 MiB); incomplete lines are left out."""
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(row_from_json(line))
        except ValueError:
            continue
    return rows


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median seconds of the last five steps; None before the first."""
    recent = [sum(row["seconds"].values()) for row in rows[-RECENT_STEPS:]]
    return statistics.median(recent) if recent else None


def seconds_left(
    rows: Sequence[Mapping[str, Any]], num_steps: int, steps_done: int | None = None
) -> float | None:
    """Estimate the seconds of the steps that are left; None before the first step.

    `steps_done` is the number of rows unless it is given.
    """
    per_step = seconds_per_step(rows)
    return None if per_step is None else per_step * max(0, num_steps - (steps_done or len(rows)))
