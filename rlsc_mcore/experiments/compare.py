"""Summarize `rlsc compare`: compare objectives on the same questions and seeds in one table and one
figure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.over_seeds import metric_names, summarize
from rlsc_mcore.evaluation.scores import score_label
from rlsc_mcore.evaluation.statistics import holm
from rlsc_mcore.experiments.runs import Experiment, Variant
from rlsc_mcore.reports.charts import Dot, dot_chart
from rlsc_mcore.reports.standalone import standalone_svg

BASE = "base"
FIGURE_METRICS = ("accuracy", "greedy", "lenient")


def gather(
    experiment: Experiment, variants: Sequence[Variant], temperatures: Sequence[float]
) -> dict[str, Any]:
    """Collect the answers of all runs into one row per objective, the base model first.

    Each row is paired by question with the base model of the same seeds. `pairs` compares every two variants.
    """
    names = metric_names(temperatures)
    trained = next(variant for variant in variants if variant.temperature_factor is None)
    before = [experiment.answers(trained, seed, "before") for seed in experiment.seeds]
    rows = {BASE: summarize(before, before, names)}
    after = {v.name: [experiment.answers(v, seed, "after") for seed in experiment.seeds] for v in variants}
    for name, answers in after.items():
        rows[name] = summarize(before, answers, names)
    _correct({name: row for name, row in rows.items() if name != BASE})
    pairs = {f"{b} - {a}": summarize(after[a], after[b], names) for a, b in itertools.combinations(after, 2)}
    _correct(pairs)
    questions = len({answer.question for answers in before for answer in answers})
    return {"questions": questions, "seeds": list(experiment.seeds), "rows": rows, "pairs": pairs}


def _correct(rows: Mapping[str, Any]) -> None:
    """Add to each change the p-value corrected over all rows of its metric (Holm).

    With several seeds, the p-value over questions and seeds is corrected. Mutates `rows`.
    """
    for metric in dict.fromkeys(metric for row in rows.values() for metric in row):
        changes = {name: row[metric]["change"] for name, row in rows.items() if metric in row}
        p_values = {name: (change["over_seeds"] or change)["p_value"] for name, change in changes.items()}
        for name, value in holm(p_values).items():
            changes[name]["corrected_p_value"] = value


def figure(result: Mapping[str, Any]) -> str:
    """Draw accuracy per objective as a standalone SVG, one panel per accuracy metric."""
    rows = result["rows"]
    panels = []
    for metric in [name for name in rows[BASE] if name.startswith(FIGURE_METRICS)]:
        dots = [
            Dot(
                name,
                row[metric]["mean"],
                *within_shares(row[metric]),
                colour=0 if name != BASE else 5,
                hollow=name == BASE,
            )
            for name, row in rows.items()
            if metric in row
        ]
        panels.append(
            (title(metric), dot_chart(dots, name=title(metric), reference=rows[BASE][metric]["mean"]))
        )
    caption = f"{result['questions']} questions, {len(result['seeds'])} seeds; 95 % intervals over questions"
    return standalone_svg(panels, caption)


def within_shares(score: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval of a score, clipped to 0 to 1."""
    return max(0.0, score["low"]), min(1.0, score["high"])


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table as Markdown: means, paired changes against the base with standard errors, and all
    pairs of variants."""
    rows = result["rows"]
    metrics = list(rows[BASE])
    lines = [
        "| | " + " | ".join(title(metric) for metric in metrics) + " |",
        "|---" + "|---:" * len(metrics) + "|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | "
            + " | ".join(_cell(metric, name, row.get(metric)).replace("\n", " ") for metric in metrics)
            + " |"
        )
    questions, seeds = result["questions"], len(result["seeds"])
    level = "questions and seeds" if seeds > 1 else "questions"
    lines += [
        "",
        f"{questions} questions, {seeds} seeds; in brackets the paired change against the base, +- its "
        f"standard error over {level}.",
        "",
    ]
    tested = [metric for metric in metrics if metric.startswith(("accuracy", "greedy"))]
    if not result.get("pairs") or not tested:
        return "\n".join(lines)
    lines += [
        f"Every pair of variants: the paired change with its 95 % interval over {level}, and the p-value "
        "corrected over the pairs (Holm).",
        "",
        "| | " + " | ".join(title(metric) for metric in tested) + " |",
        "|---" + "|---:" * len(tested) + "|",
    ]
    for name, row in result["pairs"].items():
        lines.append(f"| {name} | " + " | ".join(_pair_cell(row.get(metric)) for metric in tested) + " |")
    return "\n".join([*lines, ""])


def title(metric: str) -> str:
    """Return a short label of a score for a column or panel."""
    return score_label(metric).removeprefix("accuracy, ")


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one row per objective with the main scores and their paired changes; comparison.md has all
    scores."""
    rows = result["rows"]
    metrics = [
        metric
        for metric in rows[BASE]
        if metric.startswith(("accuracy", "confidence_f")) or metric == "greedy"
    ]
    table = Table(
        title=f"{result['questions']} questions, {len(result['seeds'])} seeds: mean (paired change +- standard error)"
    )
    table.add_column("", overflow="fold")
    for metric in metrics:
        table.add_column(title(metric), justify="right", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *(_cell(metric, name, row.get(metric)) for metric in metrics))
    console.print(table)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds such as `0,1,2`; raises ConfigError naming --seeds."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len({int(part) for part in parts}) != len(parts):
        raise ConfigError(f"--seeds: expected different whole numbers like 0,1,2, got {text!r}")
    return tuple(int(part) for part in parts)


def _cell(metric: str, name: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    digits = 1 if metric == "mean_length" else 3
    if name == BASE:
        return f"{row['mean']:.{digits}f}"
    counted = row["change"].get("over_seeds") or row["change"]
    change, error = counted["mean"], counted["standard_error"]
    return f"{row['mean']:.{digits}f}\n({change:+.{digits}f}" + (
        f" +- {error:.{digits}f})" if error is not None else ")"
    )


def _pair_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    counted = row["change"]["over_seeds"] or row["change"]
    corrected = row["change"]["corrected_p_value"]
    return f"{counted['mean']:+.3f} ({counted['low']:+.3f} to {counted['high']:+.3f}), p = {corrected:.2g}"
