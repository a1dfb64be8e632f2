"""Read the evaluations of the table 2 chain and write them next to the paper's numbers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.records import AnswerRecord, question_means, read_answers
from rlsc_mcore.evaluation.sampling_scores import pass_at_k
from rlsc_mcore.evaluation.statistics import bootstrap_interval, crossed_change, holm, paired_change
from rlsc_mcore.experiments.paper import PAPER, SHOWN_COLUMNS, TRAINED_ON
from rlsc_mcore.experiments.paper import Protocol as Asking

GREEDY = 0.0
FIELDS = ("strict", "lenient")
MARK = " †"


class SizeLike(Protocol):
    """The attributes of a model size that this module reads."""

    @property
    def name(self) -> str: ...
    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def template(self) -> str: ...
    @property
    def protocols(self) -> tuple[Asking, ...]: ...


Seeds = dict[int, list[AnswerRecord]]  # seed -> answers; the base model has only seed -1


def read_table(output: Path, sizes: Sequence[SizeLike]) -> dict[str, Any]:
    """Read all evaluations below `output`; return size -> columns, rows, changes, pass@k and temperatures.

    Scores are in percent. Raises `ConfigError` if there is no evaluation.
    """
    tables = {
        size.name: _read_size(output / size.name, size) for size in sizes if (output / size.name).is_dir()
    }
    if not any(table["rows"] for table in tables.values()):
        raise ConfigError(f"{output}: no evaluations there; run launch/reproduce_table2.sh first")
    return tables


def markdown(tables: Mapping[str, Any]) -> str:
    """Return the tables as Markdown: the paper's numbers, ours, changes against the base, pass@k, and lower
    temperatures."""
    parts = [
        "Accuracy in percent with 95 % intervals, over questions and, for trained models, averaged over "
        "seeds. Each cell:",
        "boxed answers / any answer (a stated one or the last number where nothing is boxed).",
        f"{MARK.strip()} These questions are trained on: a transductive number.",
        "",
    ]
    for name, table in tables.items():
        columns = list(table["columns"])
        parts += [f"## {name}", ""]
        parts += [f"- {column}: {note}" for column, note in table["columns"].items()]
        parts += ["", *_head([column + (MARK if column in TRAINED_ON else "") for column in columns])]
        for row, values in table["paper"].items():
            parts.append(
                f"| paper, {row} | "
                + " | ".join(f"{values[c]:.1f}" if c in values else "–" for c in columns)
                + " |"
            )
        for row, cells in table["rows"].items():
            parts.append(f"| {row} | " + " | ".join(_text(cells.get(column)) for column in columns) + " |")
        if table["changes"]:
            parts += [
                "",
                "Change of boxed answers against the base under the same template; p corrected over the "
                "columns (Holm):",
                "",
            ]
            parts += _head(columns)
            for row, cells in table["changes"].items():
                parts.append(
                    f"| {row} | " + " | ".join(_change_text(cells.get(column)) for column in columns) + " |"
                )
        for title, rows in (
            ("pass@k", table["pass_at_k"]),
            ("The base at lower temperatures", table["temperatures"]),
        ):
            keys = list(dict.fromkeys(key for cells in rows.values() for key in cells))
            if keys:
                parts += ["", f"{title} (boxed answers):", "", *_head(keys)]
                parts += [
                    f"| {row} | " + " | ".join(_interval(cells.get(key)) for key in keys) + " |"
                    for row, cells in rows.items()
                ]
        parts.append("")
    return "\n".join(parts)


def _read_size(root: Path, size: SizeLike) -> dict[str, Any]:
    notes = {
        benchmark: asking.note
        for asking in size.protocols
        if asking.column
        for benchmark in asking.benchmarks
    }
    others = (name for name in notes if name not in SHOWN_COLUMNS)
    order = [*(name for name in SHOWN_COLUMNS if name in notes), *others]
    columns = {name: notes[name] for name in order}
    rows: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    passes: dict[str, Any] = {}
    temperatures: dict[str, Any] = {}
    base: dict[
        tuple[str, str], Seeds
    ] = {}  # (protocol, benchmark) -> answers with the template of the trained models
    for label, folders, templates in _rows(root, size):
        for asking in size.protocols:
            for benchmark in asking.benchmarks:
                template = asking.template or (templates if label.startswith("base") else size.template)
                seeds = _answers(folders, asking, benchmark, template)
                if not seeds:
                    continue
                is_base = label.startswith("base")
                if asking.column:
                    rows.setdefault(label, {})[benchmark] = {
                        f: _cell(seeds, asking.temperature, f) for f in FIELDS
                    }
                elif asking.base_only:
                    temperatures.setdefault(label, {})[f"{benchmark}, T = {asking.temperature:g}"] = _cell(
                        seeds, asking.temperature, "strict"
                    )
                else:
                    passes.setdefault(label, {}).update(_pass_cells(seeds, benchmark, asking))
                if is_base and template == (asking.template or size.template):
                    base[asking.name, benchmark] = seeds
                elif not is_base and asking.column and (asking.name, benchmark) in base:
                    found = _change(base[asking.name, benchmark], seeds, asking.temperature)
                    if found is not None:
                        changes.setdefault(label, {})[benchmark] = found
    for cells in changes.values():
        for benchmark, value in holm(
            {benchmark: cell["p_value"] for benchmark, cell in cells.items()}
        ).items():
            cells[benchmark]["corrected_p_value"] = value
    paper = PAPER.get(size.name, {})
    return {
        "columns": columns,
        "paper": paper,
        "rows": rows,
        "changes": changes,
        "pass_at_k": passes,
        "temperatures": temperatures,
    }


def _rows(root: Path, size: SizeLike) -> list[tuple[str, dict[int, Path], str]]:
    """Return the rows as (label, folder per seed, template): the base first, then each arm at each step."""
    rows = [(f"base, {template}", {-1: root / "base"}, template) for template in size.templates]
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for folder in sorted(root.glob("*/seed*/step*")):
        seed, step = (
            re.fullmatch(rf"{kind}(\d+)", name)
            for kind, name in (("seed", folder.parent.name), ("step", folder.name))
        )
        if seed and step:
            found.setdefault((folder.parent.parent.name, int(step[1])), {})[int(seed[1])] = folder
    return rows + [
        (f"{arm}, {step} steps", dict(sorted(found[arm, step].items())), size.template)
        for arm, step in sorted(found)
    ]


def _answers(folders: Mapping[int, Path], asking: Asking, benchmark: str, template: str) -> Seeds:
    name = f"{benchmark.replace(':', '_')}.{template}"
    found = {seed: read_answers(folder / asking.name, name) for seed, folder in folders.items()}
    return {seed: answers for seed, answers in found.items() if answers}


def _means(seeds: Seeds, temperature: float, field: str) -> list[dict[int, float]]:
    return [question_means(answers, temperature, field) for answers in seeds.values()]


def _average(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    shared = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {question: sum(part[question] for part in parts) / len(parts) for question in sorted(shared)}


def _cell(seeds: Seeds, temperature: float, field: str) -> dict[str, Any] | None:
    return _percent(_average(_means(seeds, temperature, field)), len(seeds))


def _percent(means: Mapping[int, float], num_seeds: int) -> dict[str, Any] | None:
    if not means:
        return None
    values = list(means.values())
    low, high = bootstrap_interval(values)
    return {
        "mean": 100 * sum(values) / len(values),
        "low": max(0.0, 100 * low),
        "high": min(100.0, 100 * high),
        "questions": len(values),
        "seeds": num_seeds,
    }


def _pass_cells(seeds: Seeds, benchmark: str, asking: Asking) -> dict[str, Any]:
    cells = {}
    for k in [2**power for power in range(asking.num_samples.bit_length()) if 2**power <= asking.num_samples]:
        parts = []
        for answers in seeds.values():
            rights: dict[int, list[bool]] = {}
            for answer in answers:
                if answer.temperature == asking.temperature:
                    rights.setdefault(answer.question, []).append(answer.strict)
            parts.append(
                {
                    question: pass_at_k(len(row), sum(row), k)
                    for question, row in rights.items()
                    if len(row) >= k
                }
            )
        cell = _percent(_average(parts), len(seeds))
        if cell is not None:
            cells[f"{benchmark}, k = {k}"] = cell
    return cells


def _change(base: Seeds, seeds: Seeds, temperature: float) -> dict[str, Any] | None:
    """Return the change against the base in percentage points, or None if no question is shared.

    With several seeds, the interval and p-value are those over questions and seeds if these are wider.
    """
    before = _means(base, temperature, "strict") * len(seeds)
    after = _means(seeds, temperature, "strict")
    first, second = _average(before), _average(after)
    if not first.keys() & second.keys():
        return None
    change = asdict(paired_change(first, second))
    crossed = crossed_change(before, after)
    if crossed is not None:  # use the wider interval and the larger p-value
        change["low"], change["high"] = min(change["low"], crossed.low), max(change["high"], crossed.high)
        change["p_value"] = max(change["p_value"], crossed.p_value)
    scaled = {name: 100 * change[name] for name in ("mean", "low", "high")}
    return {**scaled, "p_value": change["p_value"], "questions": change["num_questions"], "seeds": len(seeds)}


def _head(columns: Sequence[str]) -> list[str]:
    return ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]


def _interval(cell: Mapping[str, Any] | None) -> str:
    return "–" if cell is None else f"{cell['mean']:.1f} ({cell['low']:.1f} to {cell['high']:.1f})"


def _text(cells: Mapping[str, Any] | None) -> str:
    return "–" if cells is None else " / ".join(_interval(cells[field]) for field in FIELDS)


def _change_text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return f"{cell['mean']:+.1f} ({cell['low']:+.1f} to {cell['high']:+.1f}), p = {cell['corrected_p_value']:.2g}"
