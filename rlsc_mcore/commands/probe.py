"""`rlsc probe`: find out after how many steps a setting collapses, by metrics that need no labels."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.experiments.compare import parse_seeds
from rlsc_mcore.experiments.runs import Experiment, Variant, check_flags
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.observability.metrics import read_metrics
from rlsc_mcore.observability.step_metrics import read_number
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.training.stop_rules import Rows, StopCondition

CONDITIONS = (
    "mean_length<0.5x",
    "mean_length>2x",
    "answered_share<0.8x",
    "truncated_share>0.5",
    "same_answer_share>0.5",
)
STEPS = 100
DESCRIPTION = f"""Train for a while without evaluation, and report when each collapse condition first held.

  rlsc probe --config FILE --steps {STEPS}            train one run per seed, then report
  rlsc probe --runs RUN [RUN ...]                 report on runs that there are

A condition is one of `training.stop_on`. To end a run by it, give `rlsc train` the same condition.
A probe that was stopped goes on with the same command. Every other option is one of `rlsc train` and holds
for all runs."""


def run_probe(arguments: Sequence[str]) -> int:
    """Run `rlsc probe` and return the exit code: 0 whether or not a run collapses."""
    parser = argparse.ArgumentParser(
        "rlsc probe",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="configuration file of every run")
    parser.add_argument("--runs", nargs="+", type=Path, help="train nothing: read these runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a run")
    parser.add_argument("--seeds", default="0", help="seeds, one run each")
    parser.add_argument(
        "--conditions", nargs="+", default=list(CONDITIONS), help=f"default: {' '.join(CONDITIONS)}"
    )
    parser.add_argument(
        "--stop-after", type=int, default=3, help="steps in a row in which a condition must hold"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/probe"), help="folder of the runs and of probe.json"
    )
    known, flags = parser.parse_known_args(arguments)
    conditions = [StopCondition.parse(text, field="--conditions") for text in known.conditions]
    for name, value in (("--steps", known.steps), ("--stop-after", known.stop_after)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    report = Reporter(enabled=True)
    if known.runs is not None:
        if known.config is not None or flags:
            raise ConfigError(
                f"--runs: reads runs and trains nothing, got {'--config' if known.config else flags[0]}"
            )
        _print(report, known.runs, conditions, known.stop_after)
        return 0
    if known.config is None:
        raise ConfigError(
            "--config: expected the configuration file of the runs (or --runs to read finished ones)"
        )
    check_flags(flags)
    fixed = ("--evaluation.path=None", "--training.save-every=0", f"--training.num-steps={known.steps}")
    experiment = Experiment(known.config, (*flags, *fixed), parse_seeds(known.seeds), known.output)
    variant = Variant("probe")
    experiment.config(variant, experiment.seeds[0])
    with experiment.owned("probe.json", {"runs", "conditions"}):
        experiment.run([variant], report)
        runs = [experiment.run_dir(variant, seed) for seed in experiment.seeds]
        found = _print(report, runs, conditions, known.stop_after)
        settings = {"conditions": known.conditions, "stop_after": known.stop_after, "flags": list(flags)}
        write_atomically(known.output / "probe.json", to_json({**settings, "runs": found}, indent=1) + "\n")
    report.line(f"wrote {known.output / 'probe.json'}")
    return 0


def first_step(rows: Rows, condition: StopCondition, stop_after: int) -> int | None:
    """Return the index of the first step that ends `stop_after` steps in a row in which `condition` holds."""
    ends = (end for end in range(1, len(rows) + 1) if condition.held(rows[:end], stop_after))
    return next((int(rows[end - 1]["step"]) for end in ends), None)


def _print(
    report: Reporter, runs: Sequence[Path], conditions: Sequence[StopCondition], stop_after: int
) -> dict[str, Any]:
    """Print one table per run; return run -> condition -> step, None where a condition never held."""
    found: dict[str, Any] = {}
    for run in runs:
        rows = read_metrics(run)
        if not rows:
            raise ConfigError(f"--runs {run}: no steps in its metrics.jsonl")
        table = Table(title=f"{run}: {len(rows)} steps")
        for column in ("condition", "at the first step", "at the last step", "held from step (index)"):
            table.add_column(column, justify="left" if column == "condition" else "right")
        steps = {condition.text: first_step(rows, condition, stop_after) for condition in conditions}
        for condition in conditions:
            values = (read_number(row, *condition.path) for row in (rows[0], rows[-1]))
            step = steps[condition.text]
            held = "never" if step is None else str(step - stop_after + 1)
            table.add_row(condition.text, *("-" if v is None else f"{v:.3g}" for v in values), held)
        report.console.print(table)
        collapsed = [step for step in steps.values() if step is not None]
        report.line(
            f"{run}: training.stop_on would end it after {min(collapsed) + 1} steps"
            if collapsed
            else f"{run}: no collapse in {len(rows)} steps"
        )
        found[str(run)] = {"num_steps": len(rows), "steps": steps}
    return found
