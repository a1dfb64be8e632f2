"""Find and read the benchmarks of arXiv 2506.06395, AIME 2025, and any question file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import EMBEDDED_PREFIX, read_records
from rlsc_mcore.data.records import EVALCHEMY_OPTION_SEED, read_question
from rlsc_mcore.types import Question

FIELD = "--benchmarks"
FILE_ENDS = (".jsonl", "_test.jsonl", ".json", "_test.json")  # a .json file is a JSON list


@dataclass(frozen=True)
class Benchmark:
    """The source of a benchmark on the hub and the fields of its file."""

    name: str
    hub: str
    split: str
    fields: str  # fields that each JSON object of its file needs; shown if the file is missing
    subset: str | None = None
    option_seed: int | None = None  # see `read_question`
    is_gated: bool = False  # the hub requires an account and acceptance of the terms


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "train", "`problem` and `answer`"),
        Benchmark("aime25", "math-ai/aime25", "test", "`problem` and `answer`"),
        Benchmark("math500", "HuggingFaceH4/MATH-500", "test", "`problem` and `answer`"),
        Benchmark("amc23", "math-ai/amc23", "test", "`question` and `answer`"),
        Benchmark(
            "gsm8k", "openai/gsm8k", "test", "`question` and `answer` (ending in #### N)", subset="main"
        ),
        Benchmark(
            "minerva",
            "math-ai/minervamath",
            "test",
            "`question` and `answer` (or `problem` and a `solution` with a box)",
        ),
        Benchmark(
            "olympiad",
            "math-ai/olympiadbench",
            "test",
            "`question`, `final_answer` (a list) and, where it has one, `error`",
        ),
        Benchmark(
            "mmlu_stem", "TIGER-Lab/MMLU-STEM", "test", "`question`, `choices` and `answer` (index or letter)"
        ),
        Benchmark(
            "gpqa_diamond",
            "Idavidrein/gpqa",
            "train",
            "`Question`, `Correct Answer`, `Incorrect Answer 1` to `3`",
            subset="gpqa_diamond",
            option_seed=EVALCHEMY_OPTION_SEED,
            is_gated=True,
        ),
    )
}


def load_benchmark(name: str, folder: Path | None = None) -> list[Question]:
    """Read a benchmark by name, or a question file by path (also `embedded:test`); every question has an
    answer.

    A benchmark is read from NAME.jsonl or NAME_test.jsonl (or .json) in `folder`, else from the hub. Raises
    ConfigError naming the invalid file, line and field, or the file to provide if neither source can be read.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        if not name.startswith(EMBEDDED_PREFIX) and not Path(name).suffix:
            raise ConfigError(f"{FIELD}: expected {', '.join(BENCHMARKS)} or a question file, got {name!r}")
        records = read_records(name, field=FIELD)
    else:
        file = _local_file(name, folder)
        try:
            source = str(file) if file is not None else benchmark.hub
            records = iter(
                list(read_records(source, split=benchmark.split, subset=benchmark.subset, field=FIELD))
            )
        except ConfigError as error:
            if file is not None:
                raise
            raise ConfigError(_bring(benchmark, folder, str(error))) from None
    seed = None if benchmark is None else benchmark.option_seed
    questions = [
        read_question(index, record, place, needs_answer=True, option_seed=seed)
        for index, (place, record) in enumerate(records)
    ]
    if not questions:
        raise ConfigError(f"{FIELD}: {name} holds no questions")
    return questions


def missing_benchmarks(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Return one message per benchmark that cannot be read; it names the file to provide."""
    missing = []
    for name in names:
        try:
            load_benchmark(name, folder)
        except ConfigError as error:
            missing.append(str(error))
    return missing


def _local_file(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    return next((file for file in (folder / f"{name}{end}" for end in FILE_ENDS) if file.is_file()), None)


def _bring(benchmark: Benchmark, folder: Path | None, reason: str) -> str:
    place = f"to {folder}" if folder is not None else "and name its folder with --benchmark-dir"
    terms = (
        f"; it is gated: accept the terms on the page of {benchmark.hub}, then run `hf auth login`"
        if benchmark.is_gated
        else ""
    )
    return (
        f"{FIELD}: {benchmark.name}: bring {benchmark.name}.jsonl (one JSON object per line with "
        f"{benchmark.fields}) {place}; "
        f"the hub data set {benchmark.hub} cannot be read here ({reason.partition(': ')[2][:160]}){terms}"
    )
