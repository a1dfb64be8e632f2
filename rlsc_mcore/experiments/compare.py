"""Summarize `rlsc compare`: compare objectives on the same questions and seeds in one table and one
figure."""

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.over_seeds import metric_names, summarize
from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.evaluation.scores import score_label
from rlsc_mcore.evaluation.statistics import holm
from rlsc_mcore.experiments.learning_rates import ChosenRate
from rlsc_mcore.experiments.runs import Experiment, Variant
from rlsc_mcore.reports.charts import Dot, dot_chart
from rlsc_mcore.reports.standalone import standalone_svg

BASE = "base"
FIGURE_METRICS = ("accuracy", "greedy", "lenient")


def gather(
    experiment: Experiment,
    variants: Sequence[Variant],
    temperatures: Sequence[float],
    num_samples: int = 1,
    chosen: Mapping[str, ChosenRate] | None = None,
) -> dict[str, Any]:
    """Collect the answers of all runs into one row per objective, the base model first.

    Each row is paired by question with the base model of the same seeds. `pairs` compares every two variants.
    `costs` are means over steps and seeds. `num_samples` is the number of answers to a question at a
    temperature; `chosen` are the learning rates that a validation chose.
    """
    names = metric_names(temperatures, num_samples)
    trained = next(variant for variant in variants if variant.temperature_factor is None)
    before = [experiment.answers(trained, seed, "before") for seed in experiment.seeds]
    rows = {BASE: summarize(before, before, names)}
    after = {v.name: [experiment.answers(v, seed, "after") for seed in experiment.seeds] for v in variants}
    for name, answers in after.items():
        rows[name] = summarize(before, answers, names)
    _correct({name: row for name, row in rows.items() if name != BASE})
    pairs = {f"{b} - {a}": summarize(after[a], after[b], names) for a, b in itertools.combinations(after, 2)}
    _correct(pairs)
    families = experiment.families(trained, experiment.seeds[0])
    by_family = {
        family: {
            name: summarize(_only(before, members), _only(answers, members), names)
            for name, answers in ({BASE: before} | after).items()
        }
        for family, members in families.items()
    }
    questions = len({answer.question for answers in before for answer in answers})
    return {
        "questions": questions,
        "seeds": list(experiment.seeds),
        "rows": rows,
        "pairs": pairs,
        "families": by_family,
        "costs": _costs(experiment, variants),
        "learning_rates": {name: asdict(rate) for name, rate in (chosen or {}).items()},
    }


def _costs(experiment: Experiment, variants: Sequence[Variant]) -> dict[str, dict[str, float]]:
    """Return the cost of a step of every variant that trains, with its time relative to the first of them."""
    costs: dict[str, dict[str, float]] = {}
    for variant in variants:
        found = [experiment.cost(variant, seed) for seed in experiment.seeds]
        measured = [cost for cost in found if cost is not None]
        if measured:
            costs[variant.name] = {
                name: sum(cost[name] for cost in measured) / len(measured) for name in measured[0]
            }
    for cost in costs.values():
        cost["relative_step_time"] = cost["step_seconds"] / next(iter(costs.values()))["step_seconds"]
    return costs


def _only(answers: Sequence[Sequence[AnswerRecord]], questions: Set[int]) -> list[list[AnswerRecord]]:
    return [[answer for answer in seed if answer.question in questions] for seed in answers]


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
    lines += _families_markdown(result)
    lines += _costs_markdown(result)
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


def _families_markdown(result: Mapping[str, Any]) -> list[str]:
    """Return a table of accuracy and confidence by family of questions; empty with fewer than two
    families."""
    if len(result.get("families", {})) < 2:
        return []
    metrics = family_metrics(result)
    lines = [
        "By family of questions:",
        "",
        "| family | | " + " | ".join(title(metric) for metric in metrics) + " |",
        "|---|---" + "|---:" * len(metrics) + "|",
    ]
    for family, rows in result["families"].items():
        for name, row in rows.items():
            cells = (_cell(metric, name, row.get(metric)).replace("\n", " ") for metric in metrics)
            lines.append(f"| {family} | {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _costs_markdown(result: Mapping[str, Any]) -> list[str]:
    """Return a table of learning rates and costs; empty without measured steps."""
    costs, rates = result.get("costs", {}), result.get("learning_rates", {})
    if not costs:
        return []
    first = next(iter(costs))
    lines = [
        f"Cost of a step (mean over steps and seeds; time relative to {first})"
        + (", and the learning rate with the best accuracy on the validation questions:" if rates else ":"),
        "",
        "| | learning rate | sampled tokens | trained tokens | step time |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, cost in costs.items():
        rate = rates[name]["rate"] if name in rates else "-"
        lines.append(
            f"| {name} | {rate} | {cost['sampled_tokens']:.0f} | {cost['trained_tokens']:.0f} | "
            f"{cost['relative_step_time']:.2f} |"
        )
    return [*lines, ""]


def family_metrics(result: Mapping[str, Any]) -> list[str]:
    """Return the metrics of the tables by family: accuracy at every temperature and confidence."""
    return [
        metric
        for metric in result["rows"][BASE]
        if metric.startswith(("accuracy", "confidence_f")) or metric == "greedy"
    ]


def title(metric: str) -> str:
    """Return a short label of a score for a column or panel."""
    return score_label(metric).removeprefix("accuracy, ")


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one row per objective with the main scores and their paired changes; comparison.md has all
    scores."""
    rows = result["rows"]
    metrics = family_metrics(result)
    table = Table(
        title=f"{result['questions']} questions, {len(result['seeds'])} seeds: mean (paired change +- standard error)"
    )
    table.add_column("", overflow="fold")
    for metric in metrics:
        table.add_column(title(metric), justify="right", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *(_cell(metric, name, row.get(metric)) for metric in metrics))
    console.print(table)
    families = result.get("families", {})
    if len(families) < 2:
        return
    table = Table(title="by family of questions")
    for column in ("family", ""):
        table.add_column(column, overflow="fold")
    for metric in metrics:
        table.add_column(title(metric), justify="right", overflow="fold")
    for family, family_rows in families.items():
        for name, row in family_rows.items():
            table.add_row(family, name, *(_cell(metric, name, row.get(metric)) for metric in metrics))
        table.add_section()
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
