"""The experiment of arXiv 2506.06395, table 2, as a chain of commands, and its table beside the paper's numbers.

`python -m rlsc_mcore.experiments.table2 plan ...` checks that everything is there and prints the chain, one command per line;
`... table FOLDER` reads what the chain left. launch/reproduce_table2.sh submits the chain or runs it here.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlsc_mcore
from rlsc_mcore.config import TEMPLATES, ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.evaluation.benchmarks import missing_benchmarks
from rlsc_mcore.evaluation.records import question_means, read_answers
from rlsc_mcore.evaluation.statistics import bootstrap_interval
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder

CONFIGS = Path(rlsc_mcore.__file__).parent.parent / "configs"
# Accuracy in percent, version 3 of the paper, by size, row and benchmark.
PAPER_BENCHMARKS = ("aime24", "math500", "amc23", "gsm8k", "minerva", "olympiad", "mmlu_stem", "gpqa_diamond")  # columns of Table 2
PAPER: dict[str, dict[str, dict[str, float]]] = {
    size: {row: dict(zip(PAPER_BENCHMARKS, values, strict=True)) for row, values in rows.items()}
    for size, rows in {
        "1.5b": {
            "base": (3.3, 35.6, 34.7, 73.8, 11.4, 21.6, 34.1, 19.2),
            "rlsc": (6.7, 62.4, 46.2, 74.6, 26.1, 29.9, 48.6, 15.8),
        },
        "7b": {
            "base": (13.3, 51.4, 45.0, 84.3, 10.7, 15.1, 52.3, 21.4),
            "rlsc": (26.7, 72.6, 54.7, 86.3, 32.4, 35.9, 57.6, 24.1),
        },
    }.items()
}
# The paper's recipe for 10 and for 20 steps, and one whose weights do not underflow on long answers.
TRAININGS = {
    "paper_10_steps": ("--training.num-steps", "10"),
    "paper_20_steps": ("--training.num-steps", "20"),
    "length_normalized_20_steps": ("--training.num-steps", "20", "--algorithm.confidence", "length_normalized"),
}
TEMPERATURE = "0.5"


@dataclass(frozen=True)
class Size:
    """One model of the experiment."""

    name: str
    config: Path
    script: str  # launch script of its training
    templates: tuple[str, ...] = TEMPLATES
    template: str = "qwen25-math"  # of the trained models
    benchmarks: tuple[str, ...] = PAPER_BENCHMARKS
    trainings: tuple[str, ...] = tuple(TRAININGS)


SIZES = {
    "1.5b": Size("1.5b", CONFIGS / "qwen2.5_math_1.5b_1gpu.yaml", "rlsc_1.5b_1gpu.sh"),
    "7b": Size("7b", CONFIGS / "qwen2.5_math_7b_1x8.yaml", "rlsc_7b.sh"),
    # The same chain on a CPU, for trying it out.
    "tiny": Size("tiny", CONFIGS / "tiny_cpu.yaml", "rlsc_1.5b_1gpu.sh", ("chat", "none"), "chat", ("embedded:validation",)),
}


@dataclass(frozen=True)
class Task:
    """One command of the chain; it waits for the tasks named in `after`."""

    name: str
    kind: str  # train: by the size's launch script; eval, table: as they stand
    after: tuple[str, ...]
    arguments: tuple[str, ...]


def missing(sizes: Sequence[Size], folder: Path | None) -> list[str]:
    """Name everything that the chain needs and that is not here."""
    found = missing_benchmarks(list(dict.fromkeys(name for size in sizes for name in size.benchmarks)), folder)
    for size in sizes:
        try:
            resolve_model_folder(load_config(size.config).model.path)
        except ConfigError as error:
            found.append(f"{size.name}: {error}")
    return found


def chain(sizes: Sequence[Size], output: Path, folder: Path | None, num_samples: int, flags: Sequence[str]) -> list[Task]:
    """List the tasks of all sizes in an order in which they can run; `flags` go to every training and evaluation."""
    tasks = []
    for size in sizes:
        base = load_config(size.config).model.path
        benchmarks = ("--benchmarks", ",".join(size.benchmarks), "--k", str(num_samples), "--temperature", TEMPERATURE)
        where = () if folder is None else ("--benchmark-dir", str(folder))
        root = output / size.name
        shared = load_config(size.config)
        engine = ("--model.dtype", shared.model.dtype, "--rollout.max-new-tokens", str(shared.rollout.max_new_tokens), *flags)

        def evaluation(name: str, model: str, templates: Sequence[str], after: tuple[str, ...]) -> Task:
            target = ("--templates", ",".join(templates), "--output", str(root / name))  # noqa: B023
            return Task(f"{size.name}.{name}", "eval", after, ("--model", model, *benchmarks, *where, *target, *engine))  # noqa: B023

        tasks.append(evaluation("base", base, size.templates, ()))
        for training in size.trainings:
            run = root / "runs" / training
            arguments = ("--config", str(size.config), "--run-dir", str(run), "--evaluation.path", "None", *TRAININGS[training])
            local = () if folder is None or size.name == "tiny" else ("--data.path", str(folder / "aime24.jsonl"))
            tasks.append(Task(f"{size.name}.train_{training}", "train", (), (*arguments, *local, *flags)))
            tasks.append(evaluation(training, str(run / "export"), (size.template,), (f"{size.name}.train_{training}",)))
    tasks.append(Task("table", "table", tuple(task.name for task in tasks if task.kind == "eval"), ("table", str(output))))
    return tasks


def read_table(output: Path) -> dict[str, Any]:
    """Read every evaluation below `output`: size -> row -> benchmark -> accuracy in percent with its 95 % interval, greedy and sampled."""
    sizes: dict[str, Any] = {}
    for size in [size for size in SIZES.values() if (output / size.name).is_dir()]:
        rows: dict[str, Any] = {}
        for row, templates in [("base", size.templates), *((name, (size.template,)) for name in size.trainings)]:
            for template in templates:
                label = f"base, {template}" if row == "base" else row
                for benchmark in size.benchmarks:
                    answers = read_answers(output / size.name / row, f"{benchmark.replace(':', '_')}.{template}")
                    if answers:
                        cells = {name: _cell(question_means(answers, t, "strict")) for name, t in (("greedy", 0.0), ("sampled", 0.5))}
                        rows.setdefault(label, {})[benchmark] = cells
        sizes[size.name] = {"rows": rows, "paper": PAPER.get(size.name, {})}
    if not any(size["rows"] for size in sizes.values()):
        raise ConfigError(f"{output}: no evaluations there; run launch/reproduce_table2.sh first")
    return sizes


def markdown(sizes: dict[str, Any]) -> str:
    """Write the table as Markdown: the paper's number, then ours, greedy accuracy in percent with its interval."""
    parts = ["Greedy accuracy in percent (boxed), with 95 % intervals over questions.", ""]
    for name, size in sizes.items():
        benchmarks = SIZES[name].benchmarks
        parts += [f"## {name}", "", "| | " + " | ".join(benchmarks) + " |", "|---" * (len(benchmarks) + 1) + "|"]
        for row, values in size["paper"].items():
            parts.append(f"| paper, {row} | " + " | ".join(f"{values[benchmark]:.1f}" for benchmark in benchmarks) + " |")
        for row, cells in size["rows"].items():
            parts.append(f"| {row} | " + " | ".join(_text(cells.get(benchmark)) for benchmark in benchmarks) + " |")
        parts.append("")
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Print the chain, or write the table; returns the exit code."""
    parser = argparse.ArgumentParser("table2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="check that everything is there and print the chain")
    plan.add_argument("--sizes", default="1.5b,7b", help=", ".join(SIZES))
    plan.add_argument("--output", type=Path, default=Path("runs/table2"), help="folder of the chain")
    plan.add_argument("--benchmark-dir", type=Path, help="folder of the benchmarks' files; without it the hub is asked")
    plan.add_argument("--k", type=int, default=16, help="sampled answers per question")
    table = commands.add_parser("table", help="write table2.md and table2.json")
    table.add_argument("output", type=Path)
    known, flags = parser.parse_known_args(arguments)
    if known.command == "table":
        sizes = read_table(known.output)
        (known.output / "table2.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        (known.output / "table2.md").write_text(markdown(sizes), encoding="utf-8")
        print(markdown(sizes))
        return 0
    unknown = [name for name in known.sizes.split(",") if name not in SIZES]
    if unknown:
        raise ConfigError(f"--sizes: expected some of {', '.join(SIZES)}, got {known.sizes!r}")
    sizes_asked = [SIZES[name] for name in known.sizes.split(",")]
    absent = missing(sizes_asked, known.benchmark_dir)
    for line in absent:
        print(f"missing: {line}", file=sys.stderr)
    if absent:
        raise ConfigError(f"{len(absent)} things are missing; nothing was started")
    for task in chain(sizes_asked, known.output, known.benchmark_dir, known.k, flags):
        script = next((SIZES[name].script for name in SIZES if task.name.startswith(f"{name}.")), "-")
        print("\t".join([task.name, task.kind, ",".join(task.after) or "-", script, *task.arguments]))
    return 0


def _cell(means: dict[int, float]) -> dict[str, float] | None:
    if not means:
        return None
    values = list(means.values())
    low, high = bootstrap_interval(values)
    return {"mean": 100 * sum(values) / len(values), "low": max(0.0, 100 * low), "high": min(100.0, 100 * high), "questions": len(values)}


def _text(cells: dict[str, Any] | None) -> str:
    cell = None if cells is None else cells["greedy"]
    return "–" if cell is None else f"{cell['mean']:.1f} ({cell['low']:.1f} to {cell['high']:.1f})"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"table2: {error}", file=sys.stderr)
        sys.exit(2)
