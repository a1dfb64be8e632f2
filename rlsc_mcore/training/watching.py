"""`rlsc watch`: follow a run from another terminal."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from rlsc_mcore.config import ConfigError, load_config
from rlsc_mcore.observability.metrics import read_metrics
from rlsc_mcore.observability.watch import render
from rlsc_mcore.run.status import ENDED, read_status


def run_watch(arguments: Sequence[str]) -> int:
    """`rlsc watch`: redraw until the run ends or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser("rlsc watch", description="Follow a run: curves, phase, what is left, warnings.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="print one screen and leave (the rule where there is no terminal)")
    known = parser.parse_args(arguments)
    if not known.every > 0:
        raise ConfigError(f"--every: expected more than 0, got {known.every:g}")
    file = known.run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{known.run}: no run there; expected {file}")
    num_steps = load_config(file).training.num_steps
    console = Console(highlight=False)

    def screen() -> RenderableType:
        status = read_status(known.run) or {}
        return render(known.run.resolve().name, read_metrics(known.run), status, num_steps, width=min(console.width, 110))

    if known.once or not console.is_terminal:
        console.print(screen())
        return 0
    try:
        with Live(screen(), console=console, auto_refresh=False) as live:
            while (read_status(known.run) or {}).get("state") not in ENDED:
                time.sleep(known.every)
                live.update(screen(), refresh=True)
    except KeyboardInterrupt:
        pass
    return 0
