"""The experiment of arXiv 2506.06395, table 2, as a chain of commands, and its table beside the paper's
numbers.

`python -m rlsc_mcore.experiments.table2 plan ...` checks that everything is there and prints the chain, one
command per line; `... table FOLDER` reads what the chain left. launch/reproduce_table2.sh submits the chain
or runs it here.

    OUTPUT/SIZE/base/PROTOCOL/BENCHMARK.TEMPLATE.*
    OUTPUT/SIZE/ARM/seed0/step10/PROTOCOL/BENCHMARK.TEMPLATE.*
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsc_mcore.config import TEMPLATES, Config, ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.evaluation.benchmarks import missing_benchmarks
from rlsc_mcore.experiments.compare import parse_seeds
from rlsc_mcore.experiments.paper import ARMS, PROTOCOLS, SEEDS, STEPS, TINY_PROTOCOLS, Protocol
from rlsc_mcore.experiments.table2_read import markdown, read_table
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.shipped import shipped_folder

CONFIGS = shipped_folder("configs")


@dataclass(frozen=True)
class Size:
    """One model of the experiment."""

    name: str
    config: Path
    script: str  # launch script of its training
    templates: tuple[str, ...] = TEMPLATES  # templates of the base model
    template: str = "qwen25-math"  # template of the trained models
    protocols: tuple[Protocol, ...] = PROTOCOLS

    @property
    def benchmarks(self) -> list[str]:
        """Return the benchmarks of all protocols, each once."""
        return list(dict.fromkeys(name for protocol in self.protocols for name in protocol.benchmarks))


SIZES = {
    "1.5b": Size("1.5b", CONFIGS / "qwen2.5_math_1.5b_1gpu.yaml", "rlsc_1.5b_1gpu.sh"),
    "7b": Size("7b", CONFIGS / "qwen2.5_math_7b_1x8.yaml", "rlsc_7b.sh"),
    # A trial of the chain on a CPU.
    "tiny": Size(
        "tiny", CONFIGS / "tiny_cpu.yaml", "rlsc_1.5b_1gpu.sh", ("chat", "none"), "chat", TINY_PROTOCOLS
    ),
}


@dataclass(frozen=True)
class Extent:
    """The arms, seeds and steps that are run."""

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = SEEDS
    steps: tuple[int, ...] = STEPS


@dataclass(frozen=True)
class Task:
    """One command of the chain; it starts after the tasks named in `after`."""

    name: str
    kind: str  # train: started by the size's launch script; eval and table: started directly
    after: tuple[str, ...]
    arguments: tuple[str, ...]


def missing(sizes: Sequence[Size], folder: Path | None) -> list[str]:
    """Return one message per benchmark or model that the chain needs and that cannot be read."""
    found = missing_benchmarks(
        list(dict.fromkeys(name for size in sizes for name in size.benchmarks)), folder
    )
    for size in sizes:
        try:
            resolve_model_folder(load_config(size.config).model.path)
        except ConfigError as error:
            found.append(f"{size.name}: {error}")
    return found


def chain(
    sizes: Sequence[Size], output: Path, folder: Path | None, extent: Extent, flags: Sequence[str]
) -> list[Task]:
    """Return the tasks of all sizes, each after the tasks it depends on; every training and evaluation gets
    `flags`."""
    tasks = []
    for size in sizes:
        settings = _Settings(size, load_config(size.config), output, folder, tuple(flags))
        base = (settings.config.model.path, "--model.dtype", settings.config.model.dtype)
        for protocol in size.protocols:
            templates = (protocol.template,) if protocol.template else size.templates
            tasks.append(_evaluation(settings, f"base.{protocol.name}", (), base, templates, protocol))
        for arm in extent.arms:
            for seed in extent.seeds:
                tasks += _arm(settings, arm, seed, extent.steps)
    tasks.append(
        Task(
            "table",
            "table",
            tuple(task.name for task in tasks if task.kind == "eval"),
            ("table", str(output)),
        )
    )
    return tasks


@dataclass(frozen=True)
class _Settings:
    """The settings that all tasks of one size share."""

    size: Size
    config: Config
    output: Path
    folder: Path | None  # folder of the benchmark files
    flags: tuple[str, ...]


def _arm(settings: _Settings, arm: str, seed: int, steps: Sequence[int]) -> list[Task]:
    """Return one training task with a checkpoint at every evaluated step, and the evaluation tasks."""
    size, folder = settings.size, settings.folder
    run = settings.output / size.name / "runs" / f"{arm}_seed{seed}"
    name = f"{size.name}.{arm}.seed{seed}"
    local = () if folder is None or size.name == "tiny" else ("--data.path", str(folder / "aime24.jsonl"))
    every = math.gcd(*steps)
    training = (
        *(
            "--config",
            str(size.config),
            "--run-dir",
            str(run),
            "--evaluation.path",
            "None",
            "--training.seed",
            str(seed),
        ),
        *("--training.num-steps", str(max(steps)), "--training.save-every", str(every)),
        *("--training.keep-last", str(max(steps) // every + 1)),
        *ARMS[arm],
    )
    tasks = [Task(f"{name}.train", "train", (), (*training, *local, *settings.flags))]
    for step in sorted(steps):
        for protocol in (protocol for protocol in size.protocols if not protocol.base_only):
            where = f"{arm}.seed{seed}.step{step}.{protocol.name}"
            model = (str(run), "--checkpoint", str(step))
            tasks.append(
                _evaluation(
                    settings,
                    where,
                    (f"{name}.train",),
                    model,
                    (protocol.template or size.template,),
                    protocol,
                )
            )
    return tasks


def _evaluation(
    settings: _Settings,
    where: str,
    after: tuple[str, ...],
    model: Sequence[str],
    templates: Sequence[str],
    protocol: Protocol,
) -> Task:
    """Return one `rlsc eval` task; `where` is its folder with dots as separators and ends with the protocol
    name."""
    target = (
        settings.output
        / settings.size.name
        / Path(*where.removesuffix(protocol.name).split("."))
        / protocol.name
    )
    arguments = (
        *(
            "--model",
            *model,
            "--benchmarks",
            ",".join(protocol.benchmarks),
            "--templates",
            ",".join(templates),
        ),
        *protocol.options,
        *("--output", str(target), "--rollout.max-new-tokens", str(settings.config.rollout.max_new_tokens)),
        *(() if settings.folder is None else ("--benchmark-dir", str(settings.folder))),
    )
    return Task(f"{settings.size.name}.{where}", "eval", after, (*arguments, *settings.flags))


def main(arguments: Sequence[str]) -> int:
    """Print the chain or write the table; return the exit code."""
    parser = argparse.ArgumentParser(
        "table2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="check that everything is there and print the chain")
    plan.add_argument("--sizes", default="1.5b,7b", help=", ".join(SIZES))
    plan.add_argument("--output", type=Path, default=Path("runs/table2"), help="folder of the chain")
    plan.add_argument(
        "--benchmark-dir", type=Path, help="folder of the benchmarks' files; without it the hub is asked"
    )
    plan.add_argument("--arms", default=",".join(ARMS), help=f"what is trained, of {', '.join(ARMS)}")
    plan.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="seeds of every arm")
    plan.add_argument(
        "--steps",
        default=",".join(map(str, STEPS)),
        help="steps after which every arm is evaluated; 0 is the base",
    )
    table = commands.add_parser("table", help="write table2.md and table2.json")
    table.add_argument("output", type=Path)
    known, flags = parser.parse_known_args(arguments)
    if known.command == "table":
        sizes = read_table(known.output, list(SIZES.values()))
        write_atomically(known.output / "table2.json", to_json(sizes, indent=1) + "\n")
        write_atomically(known.output / "table2.md", markdown(sizes))
        print(markdown(sizes))
        return 0
    sizes_asked = [SIZES[name] for name in _names("--sizes", known.sizes, list(SIZES))]
    extent = Extent(
        tuple(_names("--arms", known.arms, list(ARMS))), parse_seeds(known.seeds), _steps(known.steps)
    )
    absent = missing(sizes_asked, known.benchmark_dir)
    for line in absent:
        print(f"missing: {line}", file=sys.stderr)
    if absent:
        raise ConfigError(f"{len(absent)} things are missing; nothing was started")
    for task in chain(sizes_asked, known.output, known.benchmark_dir, extent, flags):
        script = next((SIZES[name].script for name in SIZES if task.name.startswith(f"{name}.")), "-")
        print("\t".join([task.name, task.kind, ",".join(task.after) or "-", script, *task.arguments]))
    return 0


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ConfigError(f"{option}: expected different ones of {', '.join(known)}, got {text!r}")
    return names


def _steps(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) != len(parts):
        raise ConfigError(f"--steps: expected different whole numbers like 10,20,40, got {text!r}")
    return tuple(sorted(map(int, parts)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"table2: {error}", file=sys.stderr)
        sys.exit(2)
