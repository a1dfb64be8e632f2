"""Splits of the question space by a hash of the text, so that no question can stand in two of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

from rlsc_mcore.assets.make.tasks import Question, draw_question

NUM_BUCKETS = 16
SPLIT_BUCKETS = {  # buckets of the hash; the rest of the space is for pretraining
    "test": range(2),
    "validation": range(2, 3),
    "train": range(3, 7),
    "pretraining": range(7, NUM_BUCKETS),
}
SPLIT_SEED = 7
SPLIT_SIZES = {"train": 1024, "validation": 240, "test": 480}


def split_of(text: str) -> str:
    """Return the name of the one split that a question text belongs to."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % NUM_BUCKETS
    return next(name for name, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def draw_from_split(random: Random, split: str) -> Question:
    """Draw one question of a split by rejection."""
    while True:
        question = draw_question(random)
        if split_of(question.text) == split:
            return question


def draw_distinct(random: Random, split: str, count: int) -> list[Question]:
    """Draw `count` questions of a split, no text twice, in the order drawn."""
    distinct: dict[str, Question] = {}
    while len(distinct) < count:
        question = draw_from_split(random, split)
        distinct.setdefault(question.text, question)
    return list(distinct.values())


def draw_splits() -> dict[str, list[Question]]:
    """Draw the questions of every split in SPLIT_SIZES, always the same ones."""
    return {
        name: draw_distinct(Random(f"{SPLIT_SEED}-{name}"), name, size) for name, size in SPLIT_SIZES.items()
    }


def write_questions(path: Path, questions: list[Question]) -> None:
    """Write one JSON object per line with the fields `question`, `answer` (a string) and `family`."""
    rows = (
        {"question": question.text, "answer": str(question.answer), "family": question.family}
        for question in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
