"""Read how far a run is and estimate the time left, from its files."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.run.files import row_from_json
from rlsc_mcore.run.folder import METRICS_FILE

RECENT_STEPS = 5
TAIL_BYTES = 1 << 20  # number of bytes that are read from the end of metrics.jsonl


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
