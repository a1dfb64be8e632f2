"""`rlsc compare`: the objectives against each other, on the same questions and seeds; one table and one figure."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.over_seeds import metric_names, summarize
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.reports.charts import Dot, dot_chart
from rlsc_mcore.reports.standalone import standalone_svg
from rlsc_mcore.training.experiments import Experiment, Variant, check_flags, run_settings

BASE = "base"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "rlsc": (),
    "rlsc_l1": ("--algorithm.alpha=0",),
    "rlsc_length_normalized": ("--algorithm.confidence=length_normalized",),
    "rlsc_token": ("--algorithm.confidence=token",),
    "rlsc_group_softmax": ("--algorithm.confidence=group_softmax",),
    "self_sft": ("--algorithm.objective=self_sft",),
    "ttrl": ("--algorithm.objective=ttrl", "--rollout.num-samples=64"),
    "entropy": ("--algorithm.objective=entropy",),
    "rlvr": ("--algorithm.objective=rlvr",),
}
LOWER_TEMPERATURE = "lower_temperature"
FIGURE_METRICS = ("accuracy", "greedy", "lenient")
DESCRIPTION = """Train and evaluate several objectives on the same questions and seeds.

A comparison that was stopped goes on with the same command. Every other option is one of `rlsc train` and holds for all runs.
`lower_temperature` trains nothing: it is the base model, answering at `--temperature-factor` times each temperature. `ttrl`
votes with 64 samples unless --rollout.num-samples is given."""


def run_compare(arguments: Sequence[str]) -> int:
    """`rlsc compare`: returns the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known_names = [*OBJECTIVES, LOWER_TEMPERATURE]
    parser.add_argument("--config", type=Path, required=True, help="configuration file of every run")
    parser.add_argument("--objectives", default="rlsc,self_sft,ttrl,entropy,rlvr,lower_temperature", help=", ".join(known_names))
    parser.add_argument("--seeds", default="0,1,2", help="seeds of every objective")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of the runs and of comparison.json, .svg and .md")
    parser.add_argument("--temperature-factor", type=float, default=0.5, help="of lower_temperature")
    known, flags = parser.parse_known_args(arguments)
    if not 0 < known.temperature_factor < 1:
        raise ConfigError(f"--temperature-factor: expected a number between 0 and 1, got {known.temperature_factor:g}")
    variants = [_variant(name, flags, known.temperature_factor) for name in _names(known.objectives, known_names)]
    experiment = Experiment(known.config, tuple(flags), parse_seeds(known.seeds), known.output)
    check_flags(flags)
    config = experiment.config(variants[0], experiment.seeds[0])
    if config.evaluation.path is None:
        raise ConfigError("evaluation.path: a comparison needs questions to evaluate on")
    if all(variant.temperature_factor is not None for variant in variants):
        raise ConfigError("--objectives: name one that trains; its run evaluates the base model too")
    report = Reporter(enabled=True)
    experiment.run(variants, report)
    trained = next(variant for variant in variants if variant.temperature_factor is None)
    result = gather(experiment, variants, config.evaluation.temperatures) | run_settings(experiment, trained)
    (known.output / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (known.output / "comparison.svg").write_text(figure(result), encoding="utf-8")
    (known.output / "comparison.md").write_text(markdown(result), encoding="utf-8")
    print_table(result, report.console)
    report.line(f"wrote {known.output}/comparison.json, .svg and .md")
    return 0


def gather(experiment: Experiment, variants: Sequence[Variant], temperatures: Sequence[float]) -> dict[str, Any]:
    """Collect all runs' answers into one row per objective, the base first; paired by question with the base of the same seeds."""
    names = metric_names(temperatures)
    trained = next(variant for variant in variants if variant.temperature_factor is None)
    before = [experiment.answers(trained, seed, "before") for seed in experiment.seeds]
    rows = {BASE: summarize(before, before, names)}
    for variant in variants:
        after = [experiment.answers(variant, seed, "after") for seed in experiment.seeds]
        rows[variant.name] = summarize(before, after, names)
    questions = len({answer.question for answers in before for answer in answers})
    return {"questions": questions, "seeds": list(experiment.seeds), "rows": rows}


def figure(result: Mapping[str, Any]) -> str:
    """Draw accuracy per objective, one panel per way of answering, as a standalone SVG."""
    rows = result["rows"]
    panels = []
    for metric in [name for name in rows[BASE] if name.startswith(FIGURE_METRICS)]:
        dots = [
            Dot(name, row[metric]["mean"], *within_shares(row[metric]), colour=0 if name != BASE else 5, hollow=name == BASE)
            for name, row in rows.items()
            if metric in row
        ]
        panels.append((title(metric), dot_chart(dots, name=title(metric), reference=rows[BASE][metric]["mean"])))
    caption = f"{result['questions']} questions, {len(result['seeds'])} seeds; 95 % intervals over questions"
    return standalone_svg(panels, caption)


def within_shares(score: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval of a share; its normal approximation may stick out of 0 to 1."""
    return max(0.0, score["low"]), min(1.0, score["high"])


def markdown(result: Mapping[str, Any]) -> str:
    """Write the table as Markdown: means, then the paired change against the base with its standard error over questions."""
    rows = result["rows"]
    metrics = list(rows[BASE])
    lines = ["| | " + " | ".join(title(metric) for metric in metrics) + " |", "|---" + "|---:" * len(metrics) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(metric, name, row.get(metric)).replace("\n", " ") for metric in metrics) + " |")
    questions, seeds = result["questions"], len(result["seeds"])
    return "\n".join(
        [*lines, "", f"{questions} questions, {seeds} seeds; in brackets the change against the base, paired by question.", ""]
    )


def title(metric: str) -> str:
    """Spell out a metric's name."""
    kind, _, temperature = metric.partition("_t")
    words = {
        "accuracy": "boxed",
        "greedy": "greedy, boxed",
        "lenient": "last number",
        "lenient_greedy": "greedy, last number",
        "confidence_f": "F",
    }
    text = words.get(kind, kind.replace("_", " "))
    return f"T = {temperature}, {text}" if temperature else text


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one row per objective: the main scores and their paired changes against the base; comparison.md has them all."""
    rows = result["rows"]
    metrics = [metric for metric in rows[BASE] if metric.startswith(("accuracy", "confidence_f")) or metric == "greedy"]
    table = Table(title=f"{result['questions']} questions, {len(result['seeds'])} seeds: mean (paired change +- standard error)")
    table.add_column("", overflow="fold")
    for metric in metrics:
        table.add_column(title(metric), justify="right", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *(_cell(metric, name, row.get(metric)) for metric in metrics))
    console.print(table)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`; raises ConfigError naming --seeds."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len({int(part) for part in parts}) != len(parts):
        raise ConfigError(f"--seeds: expected different whole numbers like 0,1,2, got {text!r}")
    return tuple(int(part) for part in parts)


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) != len(names):
        raise ConfigError(f"--objectives: expected different ones of {', '.join(known)}, got {text!r}")
    return names


def _variant(name: str, flags: Sequence[str], temperature_factor: float) -> Variant:
    if name == LOWER_TEMPERATURE:
        return Variant(name, temperature_factor=temperature_factor)
    given = {flag.partition("=")[0] for flag in flags}
    return Variant(name, tuple(flag for flag in OBJECTIVES[name] if flag.partition("=")[0] not in given))


def _cell(metric: str, name: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    digits = 1 if metric == "mean_length" else 3
    if name == BASE:
        return f"{row['mean']:.{digits}f}"
    change, error = row["change"]["mean"], row["change"]["standard_error"]
    return f"{row['mean']:.{digits}f}\n({change:+.{digits}f}" + (f" +- {error:.{digits}f})" if error is not None else ")")
