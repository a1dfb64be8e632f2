"""Write and read the results of an evaluation: scores as JSON, questions and answers as JSONL."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.files import to_json, write_atomically


@dataclass(frozen=True)
class QuestionRecord:
    """One question with its prompt."""

    question: int  # its index in its file
    text: str
    gold: str
    prompt: str  # decoded, including special tokens
    family: str = ""  # kind of question; empty if its file names none


@dataclass(frozen=True)
class AnswerRecord:
    """One graded answer."""

    question: int
    temperature: float  # 0 is greedy
    sample: int
    gold: str
    text: str
    extracted: str | None  # the final answer that is compared with the gold answer
    strict: bool
    lenient: bool
    boxed: bool
    truncated: bool
    tokens: int
    log_prob: (
        float | None
    )  # of the answer under the sampling distribution; None if the engine does not return that


def write_records(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write FOLDER/NAME.json (scores), NAME.answers.jsonl and NAME.questions.jsonl, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / f"{name}.questions.jsonl", result["questions"])
    _write_lines(folder / f"{name}.answers.jsonl", result["answers"])
    write_atomically(folder / f"{name}.json", to_json(result["scores"], indent=1) + "\n")


def read_answers(folder: Path, name: str) -> list[AnswerRecord]:
    """Read NAME.answers.jsonl; return [] if there is none. Raises ConfigError naming file and line."""
    return [
        AnswerRecord(**_only(row, AnswerRecord))
        for row in _read_lines(folder / f"{name}.answers.jsonl", AnswerRecord)
    ]


def read_question_records(folder: Path, name: str) -> dict[int, QuestionRecord]:
    """Read NAME.questions.jsonl as question index -> record; return {} if there is none.

    Raises ConfigError naming file and line.
    """
    rows = _read_lines(folder / f"{name}.questions.jsonl", QuestionRecord)
    return {int(row["question"]): QuestionRecord(**_only(row, QuestionRecord)) for row in rows}


def question_means(answers: Sequence[AnswerRecord], temperature: float, field: str) -> dict[int, float]:
    """Return question -> mean of a field (`strict`, `lenient`, `boxed`, `tokens`, ...) over its answers at
    `temperature`."""
    totals: dict[int, list[float]] = {}
    for answer in answers:
        if answer.temperature == temperature:
            totals.setdefault(answer.question, []).append(float(getattr(answer, field)))
    return {question: sum(values) / len(values) for question, values in sorted(totals.items())}


def _only(row: Mapping[str, Any], kind: type) -> dict[str, Any]:
    return {entry.name: row[entry.name] for entry in fields(kind) if entry.name in row}


def _read_lines(file: Path, kind: type) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    expected = {entry.name for entry in fields(kind) if entry.default is MISSING}
    rows = []
    # Split at \n only: answers may contain U+2028, which str.splitlines treats as a line break.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: malformed JSON ({error})") from None
        missing = sorted(expected - set(row)) if isinstance(row, dict) else sorted(expected)
        if missing:
            raise ConfigError(f"{file}, line {number}: lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def _write_lines(file: Path, rows: Sequence[Any]) -> None:
    write_atomically(file, "".join(to_json(asdict(row), ensure_ascii=False) + "\n" for row in rows))
