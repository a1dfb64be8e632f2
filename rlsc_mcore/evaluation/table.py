"""Print the table that compares scores before and after training."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.evaluation.scores import GREEDY, HIGHEST_TEMPERATURE_SCORES, key_temperature, score_label

ORDER = ("accuracy", "greedy", "lenient", "lenient_greedy", "confidence_f", *HIGHEST_TEMPERATURE_SCORES)
IN_TOKENS = ("mean_length",)


def table_rows(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return key -> label of every score in `columns`, in table order: known kinds first, each by
    temperature."""
    keys = {name for scores in columns.values() for name in scores}
    temperatures = [temperature for temperature in map(key_temperature, keys) if temperature is not None]
    highest = max(temperatures, default=None)

    def position(key: str) -> tuple[int, float, str]:
        temperature = key_temperature(key)
        kind = key if temperature is None else key.partition("_t")[0]
        return ORDER.index(kind) if kind in ORDER else len(ORDER), temperature or GREEDY, key

    return {key: score_label(key, highest) for key in sorted(keys, key=position)}


def print_comparison(
    columns: Mapping[str, Mapping[str, Any]],
    console: Console | None = None,
    title: str = "held-out questions, mean +- standard error over questions",
) -> None:
    """Print one row per score and one column per set of weights, each as mean +- standard error."""
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, label in table_rows(columns).items():
        table.add_row(label, *(_cell(name, scores.get(name)) for scores in columns.values()))
    (console or Console(highlight=False)).print(table)


def _cell(name: str, value: Any) -> str:
    # Equal values of all questions (all right, all wrong) have a spread of 0, which is no error of 0.
    if value is None:
        return "-"
    digits, unit = (1, "") if name in IN_TOKENS else (3, "")
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}{unit}" + (f" +- {error:.{digits}f}" if error else "")
