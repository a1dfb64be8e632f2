"""`rlsc watch`: follow a run from another terminal."""

import argparse
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.observability.metrics import read_metrics
from rlsc_mcore.observability.step_metrics import DESCRIPTIONS
from rlsc_mcore.run.folder import config_file
from rlsc_mcore.run.owner import owner_state
from rlsc_mcore.run.printable import printable
from rlsc_mcore.run.progress import duration, seconds_left
from rlsc_mcore.run.status import ENDED, read_status

CURVES = {name: description.watch for name, description in DESCRIPTIONS.items() if description.watch}
WARNINGS_SHOWN = 5
_BLOCKS = "▁▂▃▄▅▆▇█"


def run_watch(arguments: Sequence[str]) -> int:
    """Run `rlsc watch`: redraw until the run ends or Ctrl-C is pressed; return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc watch", description="Follow a run: curves, phase, what is left, warnings."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument(
        "--once", action="store_true", help="print one screen and leave (the rule where there is no terminal)"
    )
    known = parser.parse_args(arguments)
    if not known.every > 0:
        raise ConfigError(f"--every: expected more than 0, got {known.every:g}")
    num_steps = load_config(config_file(known.run)).training.num_steps
    console = Console(highlight=False)

    def screen() -> RenderableType:
        status = _status(known.run)
        return render(
            known.run.resolve().name,
            read_metrics(known.run),
            status,
            num_steps,
            width=min(console.width, 110),
        )

    if known.once or not console.is_terminal:
        console.print(screen())
        return 0
    try:
        with Live(screen(), console=console, auto_refresh=False) as live:
            while _status(known.run).get("state") not in ENDED:
                time.sleep(known.every)
                live.update(screen(), refresh=True)
    except KeyboardInterrupt:
        pass
    return 0


def _status(run_dir: Path) -> dict[str, Any]:
    """Read the status; return state "crash" if the run's process has ended without recording an end."""
    status = read_status(run_dir) or {}
    if status.get("state") not in ENDED and owner_state(run_dir)[0] is False:
        return {**status, "state": "crash"}
    return status


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the finite values as block characters, scaled from the smallest to the largest.

    If there are more values than `width`, neighbouring values are averaged.
    """
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return ""
    if len(kept) > width:
        edges = [round(i * len(kept) / width) for i in range(width + 1)]
        kept = [sum(kept[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(kept), max(kept)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int((value - low) / span * len(_BLOCKS)))] for value in kept)


def render(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    num_steps: int,
    *,
    width: int,
    now: float | None = None,
) -> RenderableType:
    """Return one screen; `status` is the content of status.json, empty if the run has none."""
    now = time.time() if now is None else now
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(printable(status.get("state", "no status")), style="bold"),
        _phase(status, now),
        _left(rows, num_steps, status),
    )
    done = Table.grid()  # a ProgressBar does not print a line break; the grid does
    done.add_row(ProgressBar(total=max(1, num_steps), completed=len(rows), width=max(20, width - 6)))
    parts: list[RenderableType] = [head, done]
    table = Table.grid(padding=(0, 2))
    for key, label in CURVES.items():
        values = [float(row[key]) for row in rows if isinstance(row.get(key), (int, float))]
        if values:
            curve = sparkline(values, max(10, width - 46))
            table.add_row(
                Text(label, style="dim"),
                f"{values[0]:.4g}",
                Text(curve, style="cyan"),
                Text(f"{values[-1]:.4g}", style="bold"),
            )
    parts.append(table if rows else Text("no step has ended yet", style="dim"))
    warnings = [(int(row["step"]) + 1, printable(text)) for row in rows for text in row.get("warnings", [])]
    parts += [Text(f"step {step}: {text}", style="yellow") for step, text in warnings[-WARNINGS_SHOWN:]]
    if len(warnings) > WARNINGS_SHOWN:
        parts.append(Text(f"and {len(warnings) - WARNINGS_SHOWN} earlier warnings", style="dim"))
    return Panel(Group(*parts), title=Text(f"{printable(name)}  step {len(rows)}/{num_steps}"), width=width)


def _phase(status: Mapping[str, Any], now: float) -> Text:
    phase = status.get("phase")
    if phase is None or status.get("state") != "running":
        return Text("")
    since = float(status.get("phase_since", now))
    tokens = int(status.get("tokens", 0))
    return Text(
        f"{printable(phase)} for {duration(max(0.0, now - since))}"
        + (f", {tokens:,} tokens" if tokens else "")
    )


def _left(rows: Sequence[Mapping[str, Any]], num_steps: int, status: Mapping[str, Any]) -> Text:
    left = seconds_left(rows, num_steps)
    if left is None or status.get("state") != "running" or len(rows) >= num_steps:
        return Text("")
    return Text(f"about {duration(left)} of steps left")
