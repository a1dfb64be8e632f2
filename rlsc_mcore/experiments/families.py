"""Score the evaluations of one run by group of question families, and print them before and after
training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.evaluation.over_seeds import metric_names, seed_average
from rlsc_mcore.evaluation.records import read_answers, read_question_records
from rlsc_mcore.evaluation.scores import estimate

SHOWN = ("accuracy_t1", "accuracy_t0.5", "greedy", "confidence_f")


def scores_by_group(
    run_dir: Path, groups: Mapping[str, str], temperatures: Sequence[float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return group -> "before" and "after" -> score -> mean and standard error over questions.

    `groups` maps the family of a question to its group; other families are left out.
    """
    folder = run_dir / "evaluation"
    questions = read_question_records(folder, "before")
    result: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in groups.values()}
    for side in ("before", "after"):
        answers = read_answers(folder, side)
        for group, sides in result.items():
            members = {index for index, record in questions.items() if groups.get(record.family) == group}
            mine = [[answer for answer in answers if answer.question in members]]
            sides[side] = {
                name: dict(estimate(list(means.values())))
                for name, (temperature, field) in metric_names(temperatures).items()
                if (means := seed_average(mine, temperature, field))
            }
    return result


def print_groups(
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console | None = None
) -> None:
    """Print one row per group with its main scores before and after training."""
    table = Table(title="embedded:three_modes, accuracy on held-out questions, before -> after RLSC")
    table.add_column("author")
    for label in ("T = 1", "T = 0.5", "greedy", "F"):
        table.add_column(label, justify="right")
    for group, sides in scores.items():
        cells = (
            " -> ".join(f"{sides[side][name]['mean']:.2f}" for side in ("before", "after")) for name in SHOWN
        )
        table.add_row(group, *cells)
    (console or Console(highlight=False)).print(table)
