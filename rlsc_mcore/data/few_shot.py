"""Put worked examples before a question, in the format of Qwen2.5-Math's evaluation script."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import read_records

Example = tuple[str, str]  # a question and its worked answer

_SEPARATOR = "\n\n"


def published_examples(benchmark: str) -> list[Example]:
    """Return the script's examples for a benchmark; an empty list if this package has none."""
    file = importlib.resources.files("rlsc_mcore").joinpath("assets", "few_shot", f"{benchmark}.json")
    if not file.is_file():
        return []
    examples = json.loads(file.read_text(encoding="utf-8"))["examples"]
    return [(example["question"], example["answer"]) for example in examples]


def read_examples(path: Path) -> list[Example]:
    """Read examples from a file of records with `question` (or `problem`) and `solution` (or `answer`)."""
    examples = []
    for place, record in read_records(str(path), field="--few-shot-file"):
        question = next(
            (record[name] for name in ("question", "problem") if isinstance(record.get(name), str)), None
        )
        answer = next(
            (record[name] for name in ("solution", "answer") if isinstance(record.get(name), str)), None
        )
        if question is None or answer is None:
            raise ConfigError(
                f"{place}: an example needs the texts `question` (or `problem`) and `solution` (or `answer`)"
            )
        examples.append((question, answer))
    return examples


def with_examples(question: str, examples: Sequence[Example]) -> str:
    """Return all examples followed by the question, as one turn."""
    shown = [f"{asked}\n{answer}" for asked, answer in examples]
    return _SEPARATOR.join([*shown, question])
