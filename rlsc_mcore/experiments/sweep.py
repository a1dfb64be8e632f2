"""Summarize `rlsc sweep`: accuracy and F of a grid of settings, as a table and a figure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.evaluation.over_seeds import metric_names, summarize
from rlsc_mcore.experiments.compare import BASE, title, within_shares
from rlsc_mcore.experiments.runs import Experiment, Variant, combination
from rlsc_mcore.reports.standalone import standalone_svg
from rlsc_mcore.reports.swept import SweptLine, SweptPoint, swept_chart


def gather(
    experiment: Experiment,
    variants: Sequence[Variant],
    axes: Mapping[str, Sequence[str]],
    temperatures: Sequence[float],
) -> dict[str, Any]:
    """Collect the answers of all runs into one row per combination, paired by question with its own base."""
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
    return {
        "over": dict(axes),
        "questions": len(questions),
        "seeds": list(experiment.seeds),
        "rows": {BASE: first, **rows},
    }


def figure(result: Mapping[str, Any]) -> str:
    """Draw accuracy and F against the first option with several values, as a standalone SVG.

    There is one line per combination of the other options.
    """
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
    return standalone_svg(
        panels, f"{seeds} seed{'s' if seeds > 1 else ''}; bars: 95 % intervals over questions{dots}"
    )


def _line(
    rows: Mapping[str, Any],
    metric: str,
    axes: Mapping[str, Sequence[str]],
    swept: str,
    setting: Sequence[str],
) -> SweptLine:
    """Return the line of one combination of the other options."""
    rest = dict(zip([field for field in axes if field != swept], setting, strict=True))
    points = []
    for value in axes[swept]:
        row = rows[combination({field: rest.get(field, value) for field in axes})].get(metric)
        if row is not None:
            points.append(
                SweptPoint(
                    value,
                    row["mean"],
                    *within_shares(row),
                    row["per_seed"] if len(row["per_seed"]) > 1 else (),
                )
            )
    return SweptLine(", ".join(f"{_short(field)} = {value}" for field, value in rest.items()), points)


def _shared_base(rows: Mapping[str, Any], metric: str) -> float | None:
    """Return the value before training, or None if it differs between combinations."""
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
