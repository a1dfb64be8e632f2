"""`rlsc eval`: evaluate a model or run on several benchmarks and templates with one engine."""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rlsc_mcore.config import TEMPLATES, Config, ConfigError, RunError
from rlsc_mcore.config_file import parse_config, read_flags
from rlsc_mcore.data.few_shot import Example, published_examples, read_examples, with_examples
from rlsc_mcore.data.questions import EMBEDDED_PREFIX
from rlsc_mcore.data.templates import check_prompt_lengths, find_control_tokens, render_prompt, turn_end_ids
from rlsc_mcore.evaluation.benchmarks import BENCHMARKS, load_benchmark
from rlsc_mcore.evaluation.evaluate import evaluate
from rlsc_mcore.evaluation.records import AnswerRecord, write_records
from rlsc_mcore.evaluation.sampling_scores import sampling_scores
from rlsc_mcore.evaluation.table import print_comparison
from rlsc_mcore.grading.formats import GRADERS
from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder
from rlsc_mcore.model.shape import read_architecture
from rlsc_mcore.run.folder import CHECKPOINT_HELP, CONFIG_FILE, LATEST, find_checkpoint
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import OWNER_FILE, is_main_rank, owned, release_all
from rlsc_mcore.run.scratch import remove_scratch, scratch_folder
from rlsc_mcore.training.signals import Interrupted, StopRequest
from rlsc_mcore.types import Question

DESCRIPTION = """Evaluate a model folder or a run's weights.

  rlsc eval --model DIR_OR_RUN --benchmarks aime24,math500,questions.jsonl --k 16 --templates all

Every other option is one of `rlsc train`. The answers are kept beside the scores."""


@dataclass(frozen=True)
class Job:
    """One benchmark under one prompt template."""

    benchmark: str
    template: str
    questions: Sequence[Question]
    examples: Sequence[Example] = ()  # few-shot examples before each question
    max_new_tokens: int | None = None  # None: rollout.max_new_tokens

    def prompts(self, tokenizer: Any, date: datetime) -> list[list[int]]:
        """Return the token ids of every question's prompt."""
        return [
            render_prompt(self.template, with_examples(q.text, self.examples), tokenizer, date)
            for q in self.questions
        ]

    @property
    def name(self) -> str:
        """Return a name that is safe as a file name and unique within an evaluation."""
        return f"{_stem(self.benchmark)}.{_stem(self.template)}"


@dataclass(frozen=True)
class Protocol:
    """Settings per benchmark: number of few-shot examples and longest answer in tokens."""

    few_shot: Mapping[str, int] = field(default_factory=dict)
    few_shot_file: Path | None = None
    token_budget: Mapping[str, int] = field(default_factory=dict)

    def examples(self, name: str) -> list[Example]:
        """Return the few-shot examples of a benchmark; raises ConfigError if there are too few."""
        count = self.few_shot.get(name, 0)
        known = (
            read_examples(self.few_shot_file) if self.few_shot_file is not None else published_examples(name)
        )
        if count > len(known):
            source = self.few_shot_file or "the examples of this package, which has those of mmlu_stem"
            raise ConfigError(
                f"--few-shot: {count} examples for {name}, but {source} hold {len(known)}; name a file with "
                "--few-shot-file"
            )
        return known[:count]


def run_eval(arguments: Sequence[str]) -> int:
    """Run `rlsc eval` and return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc eval",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="model folder, hub name, embedded:tiny_qwen2, or the folder of a run"
    )
    parser.add_argument("--checkpoint", help=f"of a run: {CHECKPOINT_HELP}")
    parser.add_argument(
        "--benchmarks", help=f"some of {', '.join(BENCHMARKS)}, and question files, separated by commas"
    )
    parser.add_argument("--data", help="one question file, or embedded:validation|test (the default)")
    parser.add_argument(
        "--benchmark-dir",
        type=Path,
        help="folder of the benchmarks' files, NAME.jsonl; without it the hub is asked",
    )
    parser.add_argument(
        "--templates",
        help=f"{', '.join(TEMPLATES)}, FILE.jinja, several separated by commas, or all (the named ones)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="FILE.json for one benchmark, or a folder; questions and answers go beside the scores",
    )
    parser.add_argument("--num-samples", "--k", default="4", help="answers per question at each temperature")
    parser.add_argument(
        "--temperatures", "--temperature", nargs="*", default=["0.5", "1.0"], help="beside one greedy answer"
    )
    parser.add_argument("--grader", choices=GRADERS, help="what counts as right; --evaluation.grader")
    parser.add_argument("--top-p", help="nucleus of the sampled answers; --evaluation.top-p")
    parser.add_argument(
        "--stop", nargs="+", metavar="TEXT", help="strings that end an answer; --evaluation.stop"
    )
    parser.add_argument(
        "--few-shot",
        metavar="N",
        help="worked examples before each question: N, or BENCHMARK=N,... for some benchmarks",
    )
    parser.add_argument(
        "--few-shot-file", type=Path, help="examples of your own: records with question and solution"
    )
    parser.add_argument(
        "--token-budget",
        metavar="N",
        help="longest answer in tokens: N, or BENCHMARK=N,... for some benchmarks",
    )
    known, flags = parser.parse_known_args(arguments)
    if known.benchmarks is not None and known.data is not None:
        raise ConfigError("--data: name its file among --benchmarks")
    names = _split(known.benchmarks) if known.benchmarks is not None else [known.data or "embedded:test"]
    settings = [
        "--evaluation.num-samples",
        known.num_samples,
        "--evaluation.temperatures",
        *known.temperatures,
        *flags,
    ]
    for name, value in (("grader", known.grader), ("top-p", known.top_p)):
        settings += [] if value is None else [f"--evaluation.{name}", value]
    settings += [] if known.stop is None else ["--evaluation.stop", *known.stop]
    few_shot, token_budget = (
        _numbers(f"--{o}", getattr(known, o.replace("-", "_")), names) for o in ("few-shot", "token-budget")
    )
    protocol = Protocol(few_shot, known.few_shot_file, token_budget)
    templates = (
        None
        if known.templates is None
        else list(TEMPLATES)
        if known.templates == "all"
        else _split(known.templates)
    )
    with StopRequest(on_end=lambda signal_name: _leave_nothing()).listening() as stop:
        results = evaluate_model(
            known.model,
            names,
            templates,
            settings,
            protocol,
            folder=known.benchmark_dir,
            output=known.output,
            checkpoint=known.checkpoint,
            stop=stop,
        )
    if results is not None:
        for benchmark in dict.fromkeys(job.benchmark for job in results):
            columns = {
                job.template if templates else Path(known.model).name: row
                for job, row in results.items()
                if job.benchmark == benchmark
            }
            print_comparison(
                {name: _shown(row) for name, row in columns.items()},
                title=f"{benchmark}, mean +- standard error over questions; grader: {next(iter(columns.values()))['protocol']['grader']}",
            )
    return 0


def _leave_nothing() -> None:
    """Release folders and delete temporary ones; called from another thread right before the process ends."""
    release_all()
    remove_scratch()


def evaluate_model(
    model: str,
    names: Sequence[str],
    templates: Sequence[str] | None,
    flags: Sequence[str],
    protocol: Protocol | None = None,
    *,
    folder: Path | None,
    output: Path | None,
    checkpoint: str | None = None,
    stop: StopRequest | None = None,
) -> dict[Job, dict[str, Any]] | None:
    """Evaluate a model or a run's checkpoint on every benchmark under every template.

    Collective over the world; returns None on every rank but the main one. `checkpoint` is a name as in
    `find_checkpoint`, by default the latest. All benchmarks are read and all prompts are rendered before the
    engine is built. Raises `Interrupted` on a stop signal: finished evaluations are in `output` and their
    table is printed.
    """
    from rlsc_mcore.rollout.engine import GenerationInterrupted
    from rlsc_mcore.training.faults import reported
    from rlsc_mcore.training.input_record import prompt_date
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import AbortPoll

    stop = StopRequest() if stop is None else stop  # without a signal it never stops
    run_file = Path(model) / CONFIG_FILE
    is_run = run_file.is_file()
    if checkpoint is not None and not is_run:
        raise ConfigError(f"--checkpoint {checkpoint}: --model {model} is no run")
    resume_from = find_checkpoint(Path(model), checkpoint or LATEST) if is_run else None
    with scratch_folder("eval") as scratch_path, _owned_output(output), reported():
        scratch = str(scratch_path / "run")
        # The session reads no question file. It gets the prompts of all jobs, and they determine the size of
        # the engine.
        base = read_flags(run_file) if is_run else ["--model.path", model, "--data.path", EMBEDDED_PREFIX]
        config = parse_config(
            [*base, *flags, "--run-dir", scratch, "--evaluation.path", "None"], prog="rlsc eval"
        )
        jobs = _jobs(names, templates or [config.data.template], config, folder, protocol or Protocol())
        budget = max([config.rollout.max_new_tokens, *(job.max_new_tokens or 0 for job in jobs)])
        longest = ["--rollout.max-new-tokens", str(budget)]  # sets the context length of the engine
        config = parse_config(
            [*base, *flags, *longest, "--run-dir", scratch, "--evaluation.path", "None"], prog="rlsc eval"
        )
        _check_output(output, jobs)
        tokenizer = load_tokenizer(resolve_model_folder(config.model.path), config.model)
        date = prompt_date(Path(model) if is_run else None)
        prompts = {job: job.prompts(tokenizer, date) for job in jobs}
        limit = (
            config.rollout.max_model_len
            or read_architecture(resolve_model_folder(config.model.path)).max_position_embeddings
        )
        for job in jobs:
            check_prompt_lengths(
                prompts[job],
                limit - 1,
                job.questions,
                f"--benchmarks: {job.benchmark}, template {job.template}",
            )
        asked_prompts = [prompt for job in jobs for prompt in prompts[job]]
        results: dict[Job, dict[str, Any]] = {}
        try:
            session = Session(config, stop, resume_from=resume_from, asked_prompts=asked_prompts)
        except GenerationInterrupted:
            raise _interrupted(stop, results, jobs, output) from None
        for warning in _control_token_warnings(jobs, tokenizer):
            session.report.warn(warning)
        session.progress.enter("evaluate", session.start_step)
        for job in jobs:
            try:
                result = evaluate(
                    *(
                        session.engine,
                        tokenizer,
                        job.questions,
                        prompts[job],
                        config,
                        session.groups,
                        session.progress,
                    ),
                    label=job.name,
                    max_new_tokens=job.max_new_tokens,
                    stop_token_ids=turn_end_ids(job.template, tokenizer),
                    should_stop=AbortPoll(stop, session.groups),
                )
            except GenerationInterrupted:
                session.close()
                raise _interrupted(stop, results, jobs, output) from None
            by_temperature = _by_temperature(result["answers"], config.evaluation.temperatures)
            row = result["scores"] | {
                "by_temperature": by_temperature,
                "protocol": _protocol_record(job, config),
            }
            results[job] = row
            if output is not None and session.groups.is_main:
                target = output if output.suffix == ".json" else output / f"{job.name}.json"
                write_records(target.parent, target.stem, {**result, "scores": row})
        is_main = session.groups.is_main
        session.close()
    return results if is_main else None


def _interrupted(
    stop: StopRequest, results: dict[Job, dict[str, Any]], jobs: Sequence[Job], output: Path | None
) -> Interrupted:
    """Print the scores of the finished evaluations; return the exception that reports the interruption."""
    if is_main_rank():
        for job, row in results.items():
            print_comparison(
                {job.template: _shown(row)}, title=f"{job.benchmark}, mean +- standard error over questions"
            )
    kept = f"; the finished ones are in {output}" if output is not None and results else ""
    text = f"stopped by {stop.signal_name or 'another rank'} after {len(results)} of {len(jobs)} evaluations{kept}"
    return Interrupted(stop.code - 128, text)


@contextlib.contextmanager
def _owned_output(output: Path | None) -> Iterator[None]:
    """Own the output folder or file on the main rank inside the block.

    Raises ConfigError if the output is an existing file that is not an evaluation.
    """
    if output is None or not is_main_rank():
        yield
        return
    is_file = output.suffix == ".json"
    folder = output.parent if is_file else output
    if is_file and output.exists() and not _is_evaluation(output):
        raise ConfigError(
            f"--output {output}: exists and is no evaluation of this program; it is left alone: choose "
            "another file"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with owned(folder, file_name=f".{output.stem}.owner.json" if is_file else OWNER_FILE):
            yield
    except OSError as error:
        raise RunError(f"--output {explain(error, folder) or error}") from error


def _is_evaluation(file: Path) -> bool:
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(scores, dict) and {"greedy", "lenient_greedy"} <= scores.keys()


def _jobs(
    names: Sequence[str], templates: Sequence[str], config: Config, folder: Path | None, protocol: Protocol
) -> list[Job]:
    questions = {name: load_benchmark(name, folder)[: config.evaluation.max_questions] for name in names}
    for template in templates:
        if template not in TEMPLATES and not template.endswith(".jinja"):
            raise ConfigError(
                f"--templates: expected {', '.join(TEMPLATES)}, a file ending in .jinja or all, got "
                f"{template!r}"
            )
    examples = {name: protocol.examples(name) for name in names}
    budgets = {name: protocol.token_budget.get(name, config.rollout.max_new_tokens) for name in names}
    jobs = [
        Job(name, template, tuple(questions[name]), tuple(examples[name]), budgets[name])
        for name in names
        for template in templates
    ]
    repeated = next((job.name for job in jobs if [other.name for other in jobs].count(job.name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"--benchmarks, --templates: {repeated} is asked for twice")
    return jobs


def _control_token_warnings(jobs: Sequence[Job], tokenizer: Any) -> list[str]:
    """Return a warning per benchmark with control tokens in its questions; the model does not read them as
    text."""
    warnings = []
    for benchmark, questions in {job.benchmark: job.questions for job in jobs}.items():
        found = find_control_tokens(questions, tokenizer)
        if found:
            position, token = found[0]
            warnings.append(
                f"--benchmarks: {benchmark}: question {questions[position].index} (counted from 0) holds the "
                "control token "
                f"{token!r}, and {len(found) - 1} more questions hold some: they end or forge a turn of the "
                "prompt"
            )
    return warnings


def _check_output(output: Path | None, jobs: Sequence[Job]) -> None:
    if output is None:
        return
    if output.suffix == ".json" and len(jobs) > 1:
        raise ConfigError(f"--output {output}: {len(jobs)} evaluations need a folder, not one file")
    if output.suffix and output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a file name that ends in .json, or a folder")


def _by_temperature(answers: Sequence[AnswerRecord], temperatures: Sequence[float]) -> dict[str, Any]:
    return {f"{temperature:g}": sampling_scores(answers, temperature) for temperature in temperatures}


def _protocol_record(job: Job, config: Config) -> dict[str, Any]:
    """Return the settings that are needed to reproduce the scores."""
    return {
        "template": job.template,
        "grader": config.evaluation.grader,
        "few_shot": len(job.examples),
        "max_new_tokens": job.max_new_tokens,
        "top_p": config.evaluation.top_p,
        "stop": list(config.evaluation.stop),
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the table: the scores, and per temperature avg@n, pass@n, maj@n and AUROC over all n
    samples."""
    shown = {name: value for name, value in row.items() if name not in ("by_temperature", "protocol")}
    for temperature, scores in row["by_temperature"].items():
        for name in _names_of_most_samples(scores):
            shown[f"{name}, T = {temperature}"] = scores[name]
        auroc = scores.get("calibration", {}).get("auroc_within")
        if auroc is not None:
            shown[f"AUROC of p(y|x) within a question, T = {temperature}"] = {
                "mean": auroc,
                "standard_error": None,
            }
    return shown


def _names_of_most_samples(scores: dict[str, Any]) -> list[str]:
    return [
        [name for name in scores if name.startswith(kind)][-1] for kind in ("avg@", "pass@", "maj@") if scores
    ]


def _numbers(option: str, text: str | None, names: Sequence[str]) -> dict[str, int]:
    """Parse `N` or `NAME=N,NAME=N`; return benchmark -> number."""
    if text is None:
        return {}
    pairs = [("", text)] if text.isdigit() else [part.rpartition("=")[::2] for part in text.split(",")]
    numbers: dict[str, int] = {}
    for name, value in pairs:
        if (
            not value.strip().isdigit()
            or (name and name.strip() not in names)
            or (not name and len(pairs) > 1)
        ):
            raise ConfigError(
                f"{option}: expected a number, or NAME=NUMBER,... with names among {', '.join(names)}, got "
                f"{text!r}"
            )
        numbers.update(dict.fromkeys([name.strip()] if name else names, int(value)))
    return numbers


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--benchmarks, --templates: expected names separated by commas, got {text!r}")
    return parts


def _stem(name: str) -> str:
    return (
        Path(name).stem.replace(":", "_") if Path(name).suffix else name.replace(":", "_").replace("/", "_")
    )
