"""`rlsc sweep`: a grid of settings, and accuracy and F against the swept value."""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.over_seeds import metric_names, summarize
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.reports.standalone import standalone_svg
from rlsc_mcore.reports.swept import SweptLine, SweptPoint, swept_chart
from rlsc_mcore.training.compare import BASE, markdown, parse_seeds, title, within_shares
from rlsc_mcore.training.experiments import Experiment, Variant, check_flags, combination, grid, run_settings

DESCRIPTION = """Train every combination of the swept values and compare what came out.

  rlsc sweep --config FILE --over algorithm.alpha=0,0.01,0.1,1 --over rollout.num_samples=4,16,64

A sweep that was stopped goes on with the same command. Every other option is one of `rlsc train` and holds for all runs."""


def run_sweep(arguments: Sequence[str]) -> int:
    """`rlsc sweep`: returns the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc sweep", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="configuration file of every run")
    parser.add_argument("--over", action="append", required=True, metavar="FIELD=VALUE,VALUE,...", help="a field and its values")
    parser.add_argument("--seeds", default="0", help="seeds of every combination")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="folder of the runs and of sweep.json, .svg and .md")
    known, flags = parser.parse_known_args(arguments)
    axes = _axes(known.over)
    variants = grid(axes)
    experiment = Experiment(known.config, tuple(flags), parse_seeds(known.seeds), known.output)
    configs = [experiment.config(variant, experiment.seeds[0]) for variant in variants]  # every value is refused before a run begins
    check_flags(flags)
    if configs[0].evaluation.path is None:
        raise ConfigError("evaluation.path: a sweep needs questions to evaluate on")
    report = Reporter(enabled=True)
    experiment.run(variants, report)
    temperatures = [t for t in configs[0].evaluation.temperatures if all(t in config.evaluation.temperatures for config in configs)]
    result = gather(experiment, variants, axes, temperatures) | run_settings(experiment, variants[0])
    (known.output / "sweep.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (known.output / "sweep.svg").write_text(figure(result), encoding="utf-8")
    (known.output / "sweep.md").write_text(markdown(result), encoding="utf-8")
    print_table(result, report.console)
    report.line(f"wrote {known.output}/sweep.json, .svg and .md")
    return 0


def gather(
    experiment: Experiment, variants: Sequence[Variant], axes: Mapping[str, Sequence[str]], temperatures: Sequence[float]
) -> dict[str, Any]:
    """Collect all runs' answers into one row per combination, each paired with its own base by question."""
    names = metric_names(temperatures)
    rows = {}
    first = None
    questions: set[int] = set()
    for variant in variants:
        before = [experiment.answers(variant, seed, "before") for seed in experiment.seeds]
        after = [experiment.answers(variant, seed, "after") for seed in experiment.seeds]
        rows[variant.name] = summarize(before, after, names)
        first = first or summarize(before, before, names)
        questions |= {answer.question for answers in before for answer in answers}
    return {"over": dict(axes), "questions": len(questions), "seeds": list(experiment.seeds), "rows": {BASE: first, **rows}}


def figure(result: Mapping[str, Any]) -> str:
    """Draw accuracy and F against the first option of several values, one line per setting of the others, as a standalone SVG."""
    rows, axes = result["rows"], result["over"]
    swept = next((field for field, values in axes.items() if len(values) > 1), next(iter(axes)))
    others = {field: values for field, values in axes.items() if field != swept}
    panels = []
    for metric in [name for name in rows[BASE] if name.startswith(("accuracy", "greedy", "confidence_f"))]:
        lines = [_line(rows, metric, axes, swept, setting) for setting in itertools.product(*others.values())]
        chart = swept_chart(
            [line for line in lines if line.points],
            axes[swept],
            name=title(metric),
            x_label=_short(swept),
            reference=_shared_base(rows, metric),
            reference_name="before training",
        )
        panels.append((title(metric), chart))
    seeds = len(result["seeds"])
    dots = "" if seeds == 1 else "; small dots: single seeds"
    return standalone_svg(panels, f"{seeds} seed{'s' if seeds > 1 else ''}; bars: 95 % intervals over questions{dots}")


def _line(rows: Mapping[str, Any], metric: str, axes: Mapping[str, Sequence[str]], swept: str, setting: Sequence[str]) -> SweptLine:
    """Read the points of one setting of the other options."""
    rest = dict(zip([field for field in axes if field != swept], setting, strict=True))
    points = []
    for value in axes[swept]:
        row = rows[combination({field: rest.get(field, value) for field in axes})].get(metric)
        if row is not None:
            points.append(SweptPoint(value, row["mean"], *within_shares(row), row["per_seed"] if len(row["per_seed"]) > 1 else ()))
    return SweptLine(", ".join(f"{_short(field)} = {value}" for field, value in rest.items()), points)


def _shared_base(rows: Mapping[str, Any], metric: str) -> float | None:
    """The value before training; None where it is not the same for every combination."""
    base = float(rows[BASE][metric]["mean"])
    found = [row[metric]["mean"] - row[metric]["change"]["mean"] for row in rows.values() if metric in row]
    return base if all(abs(value - base) < 1e-9 for value in found) else None


def _short(field: str) -> str:
    return field.rpartition(".")[2].replace("_", " ")


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one row per combination."""
    rows = result["rows"]
    table = Table(title="mean +- standard error over questions")
    table.add_column("")
    for metric in rows[BASE]:
        table.add_column(title(metric), justify="right")
    for name, row in rows.items():
        cells = []
        for metric in rows[BASE]:
            value, digits = row.get(metric), 1 if metric == "mean_length" else 3
            error = None if value is None else value["standard_error"]
            text = "-" if value is None else f"{value['mean']:.{digits}f}"
            cells.append(text if error is None else f"{text} +- {error:.{digits}f}")
        table.add_row(name, *cells)
    console.print(table)


def _axes(texts: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for text in texts:
        field, separator, values = text.partition("=")
        parts = [value.strip() for value in values.split(",")]
        if not separator or not field or not all(parts) or len(set(parts)) != len(parts):
            raise ConfigError(f"--over {text}: expected FIELD=VALUE,VALUE,... with different values")
        if field in axes:
            raise ConfigError(f"--over {text}: {field} is swept already")
        if field in ("run_dir", "training.seed"):
            raise ConfigError(f"--over {text}: {field} is set by the sweep itself" + ("; use --seeds" if field == "training.seed" else ""))
        axes[field] = parts
    return axes
