"""Run variants of one configuration on the same questions and seeds, each run in its own process.

A complete run is not repeated, and an unfinished run is resumed. The base model is evaluated once per seed.
The result is shared by all runs with the same model, questions and evaluation settings.
"""

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError, RunError
from rlsc_mcore.config_file import changed_fields, load_config, parse_config, read_flags
from rlsc_mcore.evaluation.records import AnswerRecord, read_answers, read_question_records
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.observability.metrics import read_metrics
from rlsc_mcore.run.folder import CONFIG_FILE
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import owned, refuse_owned
from rlsc_mcore.run.progress import regular_lines, run_line
from rlsc_mcore.training.signals import Interrupted

_SHARES_BASE = (
    "--algorithm.",
    "--optimizer.",
    "--training.num-steps",
    "--rollout.num-samples",
    "--rollout.temperature",
)


@dataclass(frozen=True)
class Variant:
    """One setting of an experiment."""

    name: str
    flags: tuple[str, ...] = ()  # in addition to the flags of the experiment
    temperature_factor: float | None = (
        None  # if set: evaluate the base model, without training, with all temperatures multiplied by it
    )


@dataclass(frozen=True)
class Experiment:
    """The configuration, flags, seeds and folder that all runs share."""

    config_file: Path
    flags: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path

    def config(self, variant: Variant, seed: int) -> Config:
        """Return the configuration of one run; raises ConfigError naming the invalid field."""
        return load_config(self.config_file, self._flags(variant, seed))

    def run_dir(self, variant: Variant, seed: int) -> Path:
        """Return the folder of one run."""
        return self.folder / f"{variant.name}_seed{seed}"

    @contextmanager
    def owned(self, result: str, fields: Set[str] = frozenset({"rows", "seeds"})) -> Iterator[None]:
        """Own the experiment's folder inside the block.

        Raises `ConfigError` if another process owns the folder, or if its file `result` was not written by
        this program, so that it does not hold `fields`. Raises `RunError` if the folder cannot be written.
        """
        file = self.folder / result
        if file.exists() and not _is_result(file, fields):
            raise ConfigError(
                f"--output {self.folder}: its {result} was not made by this program; it is left alone: "
                "choose another folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with owned(self.folder):
                yield
        except OSError as error:
            raise RunError(f"--output {explain(error, self.folder) or error}") from error

    def run(self, variants: Sequence[Variant], report: Reporter) -> None:
        """Run or resume all unfinished runs, one after the other, seed by seed.

        Raises ConfigError if a folder holds a run of another configuration, RunError if a run fails, and
        `Interrupted` after a stop signal.
        """
        for seed, variant in itertools.product(self.seeds, variants):
            self._check_same(variant, seed)
            refuse_owned(self.run_dir(variant, seed))
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        left = [
            (seed, variant) for seed in self.seeds for variant in variants if not self.is_done(variant, seed)
        ]
        done = len(self.seeds) * len(variants) - len(left)
        if done:
            report.line(f"{done} of {len(self.seeds) * len(variants)} runs are there already")
        for number, (seed, variant) in enumerate(left, start=done + 1):
            report.line(f"run {number}/{len(self.seeds) * len(variants)}: {variant.name}, seed {seed}")
            self._share_base(variant, variants, seed)
            log = self.folder / "logs" / f"{variant.name}_seed{seed}.log"
            line = partial(run_line, self.run_dir(variant, seed), f"{variant.name}, seed {seed}")
            with log.open("a", encoding="utf-8") as out, regular_lines(line, report.line):
                code, stopped_by = _finish(
                    subprocess.Popen(self._command(variant, seed), stdout=out, stderr=subprocess.STDOUT)
                )
            if stopped_by is not None:
                how = (
                    "was stopped and saved"
                    if code in (0, 128 + signal.SIGTERM)
                    else f"was stopped and ended with exit code {code}"
                )
                raise Interrupted(
                    stopped_by.number,
                    f"{variant.name}, seed {seed} {how}; the same command goes on; see {log}",
                )
            if code:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise RunError(f"{variant.name}, seed {seed}: exit code {code} ({' '.join(last)}); see {log}")
            if not self.is_done(variant, seed):
                raise RunError(f"{variant.name}, seed {seed} was stopped and saved; the same command goes on")

    def is_done(self, variant: Variant, seed: int) -> bool:
        """Return whether a run has written its last file."""
        last = "evaluation/after.json" if variant.temperature_factor is not None else "summary.json"
        return (self.run_dir(variant, seed) / last).is_file()

    def answers(self, variant: Variant, seed: int, name: str) -> list[AnswerRecord]:
        """Return the answers of one run from the evaluation `name` (before or after).

        With `temperature_factor`, each answer has the temperature before the multiplication, so that it pairs
        with the other runs.
        """
        answers = read_answers(self.run_dir(variant, seed) / "evaluation", name)
        factor = variant.temperature_factor
        if factor is None:
            return answers
        return [
            AnswerRecord(**{**vars(answer), "temperature": _restored(answer.temperature, factor)})
            for answer in answers
        ]

    def cost(self, variant: Variant, seed: int) -> dict[str, float] | None:
        """Return what a step of one run costs: sampled tokens, trained tokens and seconds, as means over
        steps.

        None for a run without metrics: it trains nothing.
        """
        rows = read_metrics(self.run_dir(variant, seed)) if variant.temperature_factor is None else []
        totals = {
            "sampled_tokens": sum(row["mean_length"] * row["num_samples"] for row in rows),
            "trained_tokens": sum(row["train_tokens"] for row in rows),
            "step_seconds": sum(sum(row["seconds"].values()) for row in rows),
        }
        return {name: total / len(rows) for name, total in totals.items()} if rows else None

    def families(self, variant: Variant, seed: int) -> dict[str, set[int]]:
        """Return the evaluation questions of one run by family, in the order of the file; {} without
        families."""
        questions = read_question_records(self.run_dir(variant, seed) / "evaluation", "before")
        families: dict[str, set[int]] = {}
        for index, record in questions.items():
            if record.family:
                families.setdefault(record.family, set()).add(index)
        return families

    def _flags(self, variant: Variant, seed: int) -> list[str]:
        return [
            *self.flags,
            *variant.flags,
            "--training.seed",
            str(seed),
            "--run-dir",
            str(self.run_dir(variant, seed)),
        ]

    def _command(self, variant: Variant, seed: int) -> list[str]:
        program = [sys.executable, "-m", "rlsc_mcore.cli"]
        if variant.temperature_factor is None:
            return [*program, "train", "--config", str(self.config_file), *self._flags(variant, seed)]
        config = self.config(variant, seed)
        temperatures = [
            f"{variant.temperature_factor * temperature:g}" for temperature in config.evaluation.temperatures
        ]
        output = self.run_dir(variant, seed) / "evaluation" / "after.json"
        settings = [*read_flags(self.config_file), *self._flags(variant, seed)]
        return [
            *(*program, "eval", "--model", config.model.path, "--data", str(config.evaluation.path)),
            *(
                "--num-samples",
                str(config.evaluation.num_samples),
                "--output",
                str(output),
                "--temperatures",
                *temperatures,
            ),
            *_without_evaluation(settings),
            *(
                []
                if config.evaluation.max_questions is None
                else ["--evaluation.max-questions", str(config.evaluation.max_questions)]
            ),
        ]

    def _check_same(self, variant: Variant, seed: int) -> None:
        file = self.run_dir(variant, seed) / CONFIG_FILE
        changes = changed_fields(load_config(file), self.config(variant, seed)) if file.is_file() else []
        if changes:
            raise ConfigError(
                f"{file.parent} holds a run with another configuration ({'; '.join(changes)}); choose "
                "another --output"
            )

    def _share_base(self, variant: Variant, variants: Sequence[Variant], seed: int) -> None:
        """Copy the base model's evaluation from a finished run of the same seed if it has the same
        settings."""
        target = self.run_dir(variant, seed) / "evaluation"
        if (target / "before.json").is_file() or not _keeps_base(variant):
            return
        for other in variants:
            source = self.run_dir(other, seed) / "evaluation"
            if (
                other != variant
                and _keeps_base(other)
                and self.is_done(other, seed)
                and (source / "before.json").is_file()
            ):
                target.mkdir(parents=True, exist_ok=True)
                for name in ("before.questions.jsonl", "before.answers.jsonl", "before.json"):
                    shutil.copyfile(source / name, target / name)
                return


def _is_result(file: Path, fields: Set[str]) -> bool:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and fields <= result.keys()


def grid(axes: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Return one variant per combination of the swept values."""
    variants = []
    for values in itertools.product(*axes.values()):
        pairs = list(zip(axes, values, strict=True))
        flags = tuple(text for field, value in pairs for text in (f"--{field.replace('_', '-')}={value}",))
        variants.append(Variant(combination(dict(pairs)), flags))
    return variants


def combination(values: Mapping[str, str]) -> str:
    """Return the name of one combination of swept values."""
    return "_".join(f"{field.rpartition('.')[2]}={value}" for field, value in values.items()).replace(
        "/", "-"
    )


def run_settings(experiment: Experiment, variant: Variant) -> dict[str, Any]:
    """Return the versions and settings of one finished run, for the result file of the experiment."""
    config = experiment.config(variant, experiment.seeds[0])
    summary = experiment.run_dir(variant, experiment.seeds[0]) / "summary.json"
    return {
        "versions": json.loads(summary.read_text(encoding="utf-8")).get("versions", {}),
        "settings": {
            "steps": config.training.num_steps,
            "evaluation": config.evaluation.path,
            "flags": list(experiment.flags),
        },
    }


def check_flags(flags: Sequence[str]) -> None:
    """Raise ConfigError at the first flag that is not an option of `rlsc train`."""
    parse_config(["--run-dir", "x", "--model.path", "x", "--data.path", "x", *flags])


def _finish(process: "subprocess.Popen[bytes]") -> tuple[int, Interrupted | None]:
    """Wait for a run; return its exit code and the stop signal that this process received, or None.

    The first stop signal is passed on as SIGTERM: the run saves a checkpoint and exits, without a time limit.
    The next one is passed on as SIGINT, which ends the run.
    """
    stopped_by: Interrupted | None = None
    while True:
        try:
            return process.wait(), stopped_by
        except KeyboardInterrupt as error:
            is_first = stopped_by is None
            stopped_by = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
            process.send_signal(signal.SIGTERM if is_first else signal.SIGINT)


def _keeps_base(variant: Variant) -> bool:
    return variant.temperature_factor is None and all(flag.startswith(_SHARES_BASE) for flag in variant.flags)


def _restored(temperature: float, factor: float) -> float:
    return float(f"{temperature / factor:.6g}")


def _without_evaluation(flags: Sequence[str]) -> list[str]:
    """Return the flags without those (and their values) that `_command` sets for `rlsc eval`."""
    kept: list[str] = []
    dropping = False
    for flag in flags:
        if flag.startswith("--"):
            dropping = flag.startswith(("--evaluation.", "--run-dir", "--model.path"))
        if not dropping:
            kept.append(flag)
    return kept
