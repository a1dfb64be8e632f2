"""Worked examples before a question: the published prompt byte for byte, examples of one's own, errors by
message."""

import hashlib
import json
from pathlib import Path

import pytest

from rlsc_mcore.commands.eval import Protocol, run_eval
from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.few_shot import published_examples, read_examples, with_examples
from rlsc_mcore.data.records import read_question
from rlsc_mcore.data.templates import render_text
from tests.unit.test_templates import make_tokenizer

# Of the prompt that the script of Qwen2.5-Math (qwen25-math-cot, 5 shots) builds for the question below.
SCRIPT_SHA256 = "58ba89b51cde88aa8de4d69d5a9767e74fafc1e7690d903bb023ed1ec893c1b8"


def test_the_prompt_of_mmlu_stem_is_the_published_one() -> None:
    question = read_question(
        0, {"question": " Which? ", "choices": ["a", "b", "c ", "d"], "answer": 2}, "file"
    )
    examples = published_examples("mmlu_stem")
    prompt = render_text("qwen25-math", with_examples(question.text, examples), make_tokenizer(None))
    assert len(examples) == 5 and question.answer == "C"
    assert hashlib.sha256(prompt.encode()).hexdigest() == SCRIPT_SHA256


def test_examples_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    records = [{"problem": "1+1?", "solution": "It is \\boxed{2}."}, {"question": "2+2?", "answer": "4"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    protocol = Protocol({"gsm8k": 2, "math500": 1}, file)
    assert with_examples("3+3?", protocol.examples("gsm8k")) == "1+1?\nIt is \\boxed{2}.\n\n2+2?\n4\n\n3+3?"
    assert protocol.examples("math500") == read_examples(file)[:1]
    assert protocol.examples("aime24") == [] and with_examples("q", []) == "q"
    with pytest.raises(ConfigError, match=r"^--few-shot: 3 examples for gsm8k, but .*examples.jsonl hold 2"):
        Protocol({"gsm8k": 3}, file).examples("gsm8k")
    file.write_text('{"question": "q"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^--few-shot-file: .*examples.jsonl, line 1: an example needs"):
        read_examples(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--few-shot", "2"],
            "--few-shot: 2 examples for embedded:test, but .* hold 0; name a file with --few-shot-file",
        ),
        (["--few-shot", "gsm8k=2"], "--few-shot: expected a number, or NAME=NUMBER"),
        (["--token-budget", "many"], "--token-budget: expected a number, or NAME=NUMBER"),
        (["--top-p", "0"], "evaluation.top_p"),
        (
            ["--few-shot", "1", "--few-shot-file", "absent.jsonl"],
            "--few-shot-file: no such file: absent.jsonl",
        ),
    ],
)
def test_bad_protocols_are_refused_before_an_engine_is_built(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run_eval(["--model", "embedded:tiny_qwen2", *arguments])
    assert "\n" not in str(error.value)
