r"""Grade like the evaluation script of Qwen2.5-Math, for comparison with published results.

Rules in addition to `is_correct`: numbers are equal within a relative tolerance of 1e-4, also to 1/100 and
100 times the gold answer (percentages). Tuples and intervals are compared item by item, and the kind of
bracket is ignored. Text is compared without regard to case. `x=` is removed. Without a box, the text after
"the answer is" counts, else the last number. If a multiple choice answer has several letters, the last one
counts.
"""

import math
import re

from rlsc_mcore.grading.answers import Grade, is_correct
from rlsc_mcore.grading.expressions import number_value
from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.grading.latex import compact, normalize, plain_text
from rlsc_mcore.grading.structures import read_brackets, read_matrix, read_relation, split_items
from rlsc_mcore.grading.units import split_measure

RELATIVE_TOLERANCE = 1e-4

_LAST_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
_LETTER = re.compile(r"\b([A-E])\b")


def grade_official(response: str, gold: str) -> Grade:
    """Grade a response; `strict` and `lenient` are equal, because the script has only one rule."""
    extracted = extract_official(response)
    correct = bool(extracted) and is_close_or_equal(extracted, gold)
    return Grade(
        strict=correct,
        lenient=correct,
        boxed=extract_boxed(response) is not None,
        extracted=extracted or None,
    )


def grade_official_choice(response: str, gold: str) -> Grade:
    """Grade a response to a multiple choice question by the letter that the script finds."""
    letter = extract_official_choice(response)
    return Grade(
        strict=letter == gold,
        lenient=letter == gold,
        boxed=extract_boxed(response) is not None,
        extracted=letter,
    )


def extract_official(response: str) -> str:
    """Return the last box, else the text after "the answer is" or "final answer is", else the last number,
    else "".

    The text in "final answer is $...$. I hope" comes before all of these.
    """
    _, stated, after = response.rpartition("final answer is $")
    if stated and "$. I hope" in after:
        return after.partition("$. I hope")[0].strip()
    boxed = extract_boxed(response)
    if boxed is not None:
        return boxed
    for phrase in ("he answer is", "final answer is"):
        _, stated, after = response.rpartition(phrase)
        if stated:
            return re.sub(r"\n\s*", "", after.strip()).lstrip(":").strip().rstrip("./")
    numbers = _LAST_NUMBER.findall(response.replace(",", ""))
    return numbers[-1] if numbers else ""


def extract_official_choice(response: str) -> str | None:
    """Return the first single letter A to E after the last "answer is" or "choice is".

    Without such a phrase, return the last single letter A to E, or None.
    """
    text = response.strip("\n")
    if max(text.count(phrase) for phrase in ("choice is", "answer is")) > 1:
        text = text.partition("\n\n")[0]
    parts = re.split("choice is|answer is", text)
    letters = _LETTER.findall(parts[-1].upper())
    if not letters:
        return None
    return str(letters[0] if len(parts) > 1 else letters[-1])


def is_close_or_equal(answer: str, gold: str) -> bool:
    """Return whether `is_correct` accepts the answer, or it is equal within the script's tolerance."""
    if is_correct(answer, gold):
        return True
    first, second = normalize(answer), normalize(gold)
    return bool(first) and bool(second) and _is_close(first, second)


def _is_close(answer: str, gold: str) -> bool:
    if plain_text(compact(answer)).casefold() == plain_text(compact(gold)).casefold():
        return True
    answer, gold = _without_short_name(answer), _without_short_name(gold)
    measure, gold_measure = split_measure(answer), split_measure(gold)
    value, gold_value = number_value(measure.core), number_value(gold_measure.core)
    if value is not None and gold_value is not None:
        return any(
            math.isclose(value, expected, rel_tol=RELATIVE_TOLERANCE)
            for expected in (gold_value / 100, gold_value, gold_value * 100)
        )
    matrix, gold_matrix = read_matrix(answer), read_matrix(gold)
    if matrix is not None and gold_matrix is not None:
        return _all_close(
            [cell for row in matrix[1] for cell in row], [cell for row in gold_matrix[1] for cell in row]
        )
    brackets, gold_brackets = read_brackets(answer), read_brackets(gold)
    if brackets is not None and gold_brackets is not None:
        return _all_close(split_items(brackets.inside), split_items(gold_brackets.inside))
    return False


def _all_close(items: list[str], gold_items: list[str]) -> bool:
    return len(items) == len(gold_items) > 0 and all(
        is_correct(a, b) or _is_close(a, b) for a, b in zip(items, gold_items, strict=True)
    )


def _without_short_name(text: str) -> str:
    relation = read_relation(text)
    return (
        relation[0][1] if relation is not None and relation[1] == ["="] and len(relation[0][0]) <= 2 else text
    )
