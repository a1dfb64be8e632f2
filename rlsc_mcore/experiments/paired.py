"""Compare finished evaluations of runs or `rlsc eval` folders in pairs, question by question.

Each benchmark is tested separately; the p-values of a comparison are corrected over the benchmarks (Holm).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.records import AnswerRecord, question_means, read_answers, read_question_records
from rlsc_mcore.evaluation.statistics import holm, paired_change
from rlsc_mcore.run.folder import CONFIG_FILE

SUFFIX = ".answers.jsonl"
FIELDS = {"strict": "boxed", "lenient": "last number"}


@dataclass(frozen=True)
class Evaluated:
    """The evaluations of one run or folder."""

    name: str
    folder: Path
    benchmarks: dict[str, tuple[Path, str]]  # displayed name -> folder and stem of its files


def find_evaluations(folder: Path) -> Evaluated:
    """Find a run's evaluation after training, or every evaluation that `rlsc eval --output` wrote to a
    folder.

    Raises `ConfigError` naming the folder if there is none.
    """
    if (folder / CONFIG_FILE).is_file():
        found = {"evaluation": (folder / "evaluation", "after")}
        if not (folder / "evaluation" / f"after{SUFFIX}").is_file():
            raise ConfigError(
                f"--runs {folder}: the run has no evaluation after training; finish it, or evaluate it with "
                "rlsc eval"
            )
    else:
        stems = sorted(file.name.removesuffix(SUFFIX) for file in folder.glob(f"*{SUFFIX}"))
        found = {stem: (folder, stem) for stem in stems}
        if not found:
            raise ConfigError(f"--runs {folder}: neither a run nor a folder of rlsc eval: no *{SUFFIX} in it")
    return Evaluated(folder.resolve().name, folder, found)


def compare_evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Compare every pair of evaluated folders on each benchmark and temperature that both have.

    Returns one row per pair, benchmark, temperature and grading rule with the means, the paired change with
    interval and p-value, and the p-value corrected over the pair's benchmarks. Raises `ConfigError` if a pair
    shares no benchmark, or if the same question index holds different questions.
    """
    if len(folders) < 2:
        raise ConfigError(f"--runs: expected two folders or more to compare, got {len(folders)}")
    names = [folder.resolve() for folder in folders]
    if len(set(names)) != len(names):
        raise ConfigError("--runs: expected different folders")
    rows = []
    for first, second in itertools.combinations(map(find_evaluations, folders), 2):
        pairs = _paired_benchmarks(first, second)
        if not pairs:
            known = [", ".join(side.benchmarks) for side in (first, second)]
            raise ConfigError(
                f"--runs: {first.folder} ({known[0]}) and {second.folder} ({known[1]}) share no benchmark"
            )
        changes = []
        for benchmark, sides in pairs.items():
            changes += [{"benchmark": benchmark, **row} for row in _changes(*sides)]
        for kind in dict.fromkeys((row["temperature"], row["graded"]) for row in changes):
            group = [row for row in changes if (row["temperature"], row["graded"]) == kind]
            corrected = holm({row["benchmark"]: row["p_value"] for row in group})
            for row in group:
                row["corrected_p_value"] = corrected[row["benchmark"]]
        rows += [{"first": str(first.folder), "second": str(second.folder), **row} for row in changes]
    return rows


def print_pairs(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print one line per comparison."""
    table = Table(
        title="second - first, paired by question: 95 % interval, p of no change, p corrected over the benchmarks"
    )
    for name in (
        "first",
        "second",
        "benchmark",
        "T",
        "graded",
        "first",
        "second",
        "change",
        "p",
        "corrected",
    ):
        table.add_column(
            name,
            justify="left" if name in ("first", "second", "benchmark", "graded") else "right",
            overflow="fold",
        )
    for row in rows:
        change = f"{row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        where = (
            Path(row["first"]).name,
            Path(row["second"]).name,
            row["benchmark"],
            f"{row['temperature']:g}",
            row["graded"],
        )
        values = (f"{row['first_mean']:.3f}", f"{row['second_mean']:.3f}", change)
        table.add_row(*where, *values, f"{row['p_value']:.3g}", f"{row['corrected_p_value']:.3g}")
    console.print(table)


def _paired_benchmarks(
    first: Evaluated, second: Evaluated
) -> dict[str, tuple[list[AnswerRecord], list[AnswerRecord]]]:
    pairs = {}
    for name in first.benchmarks:
        if name not in second.benchmarks:
            continue
        places = (first.benchmarks[name], second.benchmarks[name])
        asked = [read_question_records(*place) for place in places]
        changed = [
            index
            for index in asked[0].keys() & asked[1].keys()
            if _asks(asked[0][index]) != _asks(asked[1][index])
        ]
        if changed:
            raise ConfigError(
                f"--runs: {name}: question {min(changed)} is another one in {places[0][0]} than in "
                f"{places[1][0]}; "
                "compare evaluations of the same file"
            )
        pairs[name] = (read_answers(*places[0]), read_answers(*places[1]))
    return pairs


def _asks(record: Any) -> tuple[str, str]:
    return record.text, record.gold


def _changes(first: Sequence[AnswerRecord], second: Sequence[AnswerRecord]) -> list[dict[str, Any]]:
    rows = []
    for temperature in sorted(
        {answer.temperature for answer in first} & {answer.temperature for answer in second}
    ):
        for field, graded in FIELDS.items():
            before, after = (question_means(answers, temperature, field) for answers in (first, second))
            shared = before.keys() & after.keys()
            if not shared:
                continue
            change = asdict(paired_change(before, after))
            means = [sum(side[question] for question in shared) / len(shared) for side in (before, after)]
            rows.append(
                {
                    "temperature": temperature,
                    "graded": graded,
                    "first_mean": means[0],
                    "second_mean": means[1],
                    "change": change.pop("mean"),
                    **change,
                }
            )
    return rows
