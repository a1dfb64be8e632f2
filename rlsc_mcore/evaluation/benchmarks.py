"""The eight benchmarks of arXiv 2506.06395 and any question file: find it, read it, keep its own answer format."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import EMBEDDED_PREFIX, final_answer, read_records
from rlsc_mcore.grading.answers import extract_boxed
from rlsc_mcore.types import Question

LETTERS = "ABCDEFGHIJ"
CHOICE_INSTRUCTION = "Answer with the letter of the right option."
FIELD = "--benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is published and what its file holds."""

    name: str
    hub: str
    split: str
    fields: str  # what each object of its file needs, for the message that says which file to bring
    subset: str | None = None


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "train", "`problem` and `answer`"),
        Benchmark("math500", "HuggingFaceH4/MATH-500", "test", "`problem` and `answer`"),
        Benchmark("amc23", "math-ai/amc23", "test", "`question` and `answer`"),
        Benchmark("gsm8k", "openai/gsm8k", "test", "`question` and `answer` (ending in #### N)", subset="main"),
        Benchmark("minerva", "math-ai/minervamath", "test", "`question` and `answer` (or `problem` and a `solution` with a box)"),
        Benchmark("olympiad", "math-ai/olympiadbench", "test", "`question`, `final_answer` (a list) and, where it has one, `error`"),
        Benchmark("mmlu_stem", "TIGER-Lab/MMLU-STEM", "test", "`question`, `choices` and `answer` (index or letter)"),
        Benchmark(
            "gpqa_diamond", "Idavidrein/gpqa", "train", "`Question`, `Correct Answer`, `Incorrect Answer 1` to `3`", subset="gpqa_diamond"
        ),
    )
}


def load_benchmark(name: str, folder: Path | None = None) -> list[Question]:
    """Read a benchmark by name, or a question file by path (`embedded:test` too); every question has an answer.

    A named one is looked for as NAME.jsonl or NAME_test.jsonl in `folder`, then on the hub. Raises ConfigError naming the
    file, line and field that is wrong, or the file to bring where there is neither file nor network.
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
            records = iter(list(read_records(source, split=benchmark.split, subset=benchmark.subset, field=FIELD)))
        except ConfigError as error:
            if file is not None:
                raise
            raise ConfigError(_bring(benchmark, folder, str(error))) from None
    questions = [read_question(index, record, place) for index, (place, record) in enumerate(records)]
    if not questions:
        raise ConfigError(f"{FIELD}: {name} holds no questions")
    return questions


def missing_benchmarks(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Name every benchmark that cannot be read here, each with the file to bring."""
    missing = []
    for name in names:
        try:
            load_benchmark(name, folder)
        except ConfigError as error:
            missing.append(str(error))
    return missing


def read_question(index: int, record: Any, place: str) -> Question:
    """Turn one record of any of the benchmarks into a question; its fields say which kind it is."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"{place}: expected a JSON object, got {type(record).__name__}")
    text = next((record[name] for name in ("problem", "question", "Question") if isinstance(record.get(name), str)), "")
    if not text.strip():
        raise ConfigError(f"{place}: a question without text: expected `problem` or `question`")
    if "Correct Answer" in record:
        return _gpqa(index, record, text, place)
    if "choices" in record or "options" in record:
        options = record.get("choices", record.get("options"))
        if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= len(LETTERS):
            raise ConfigError(f"{place}: `choices`: expected a list of 2 to {len(LETTERS)} options")
        return _choice(index, text, [str(option) for option in options], _letter(record.get("answer"), len(options), place))
    if "final_answer" in record:
        return _olympiad(index, record, text, place)
    answer = record.get("answer")
    if answer is None and isinstance(record.get("solution"), str):
        answer = extract_boxed(record["solution"])
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not final_answer(answer):
        raise ConfigError(f"{place}: `answer`: expected a string or a number to grade against")
    return Question(index, text, final_answer(answer))


def _choice(index: int, text: str, options: Sequence[str], answer: str) -> Question:
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Question(index, "\n".join([text.strip(), *lines, CHOICE_INSTRUCTION]), answer, answer_format="choice")


def _gpqa(index: int, record: Mapping[str, Any], text: str, place: str) -> Question:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    absent = next((name for name in names if not isinstance(record.get(name), str)), None)
    if absent is not None:
        raise ConfigError(f"{place}: `{absent}`: expected the option's text")
    options = [record[name].strip() for name in names]
    # The published order gives the answer away; this one depends on the question alone.
    order = list(range(len(options)))
    random.Random(hashlib.sha256(text.encode()).digest()).shuffle(order)
    return _choice(index, text, [options[i] for i in order], LETTERS[order.index(0)])


def _olympiad(index: int, record: Mapping[str, Any], text: str, place: str) -> Question:
    answers = record["final_answer"]
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise ConfigError(f"{place}: `final_answer`: expected a list of answers")
    error = record.get("error")
    try:
        tolerance = max(float(part) for part in str(error).split(",")) if error not in (None, "") else None
    except ValueError:
        raise ConfigError(f"{place}: `error`: expected a number, got {error!r}") from None
    context = record.get("context")
    asked = f"{context}\n{text}" if isinstance(context, str) and context.strip() else text
    return Question(index, asked, ", ".join(answers), tolerance=tolerance)


def _letter(answer: Any, count: int, place: str) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return LETTERS[answer]
    text = str(answer).strip().strip("()").upper()
    if text.isdigit() and int(text) < count:
        return LETTERS[int(text)]
    if text not in tuple(LETTERS[:count]):
        raise ConfigError(f"{place}: `answer`: expected an index or a letter of the {count} choices, got {answer!r}")
    return text


def _local_file(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    return next((file for file in (folder / f"{name}.jsonl", folder / f"{name}_test.jsonl") if file.is_file()), None)


def _bring(benchmark: Benchmark, folder: Path | None, reason: str) -> str:
    place = f"to {folder}" if folder is not None else "and name its folder with --benchmark-dir"
    return (
        f"{FIELD}: {benchmark.name}: bring {benchmark.name}.jsonl (one JSON object per line with {benchmark.fields}) {place}; "
        f"the hub data set {benchmark.hub} cannot be read here ({reason.partition(': ')[2][:160]})"
    )
