"""Records of an evaluation: what is written reads back, and damage is named by file and line."""

from pathlib import Path

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.records import (
    AnswerRecord,
    QuestionRecord,
    question_means,
    read_answers,
    read_question_records,
    write_records,
)


def answer(
    question: int, temperature: float, strict: bool, text: str = "so \\boxed{8}\u2028😀"
) -> AnswerRecord:
    return AnswerRecord(question, temperature, 0, "8", text, "8", strict, True, True, False, 12, -0.5)


def test_records_read_back_equal(tmp_path: Path) -> None:
    answers = [answer(0, 1.0, True), answer(1, 1.0, False, "a\nb \udc80"), answer(1, 0.0, True, "")]
    questions = [QuestionRecord(0, "1+7?\u2028", "8", "<|im_start|>"), QuestionRecord(1, "ä", "8", "ä")]
    write_records(
        tmp_path / "evaluation",
        "before",
        {"scores": {"greedy": None}, "answers": answers, "questions": questions},
    )
    assert read_answers(tmp_path / "evaluation", "before") == answers
    assert read_question_records(tmp_path / "evaluation", "before") == {0: questions[0], 1: questions[1]}
    assert sorted(file.name for file in (tmp_path / "evaluation").iterdir()) == [
        "before.answers.jsonl",
        "before.json",
        "before.questions.jsonl",
    ]


def test_absent_records_are_empty(tmp_path: Path) -> None:
    assert read_answers(tmp_path, "after") == [] and read_question_records(tmp_path, "after") == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "malformed JSON"), ("3", "lacks"), ('{"question": 1}', "lacks boxed, extracted")],
)
def test_damaged_records_are_named(tmp_path: Path, line: str, reason: str) -> None:
    write_records(tmp_path, "after", {"scores": {}, "answers": [answer(0, 1.0, True)], "questions": []})
    file = tmp_path / "after.answers.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"after.answers.jsonl, line 2: {reason}"):
        read_answers(tmp_path, "after")


def test_question_means_by_hand() -> None:
    answers = [answer(3, 1.0, True), answer(3, 1.0, False), answer(1, 1.0, True), answer(1, 0.5, False)]
    assert question_means(answers, 1.0, "strict") == {1: 1.0, 3: 0.5}
    assert question_means(answers, 0.5, "tokens") == {1: 12.0}
