"""Grade a response against the gold answer; `equality.py` decides whether two answers are equal."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rlsc_mcore.grading import structures
from rlsc_mcore.grading.equality import are_equal
from rlsc_mcore.grading.extraction import extract_boxed, extract_last_number, extract_stated, last_boxes
from rlsc_mcore.grading.latex import normalize
from rlsc_mcore.grading.numbers import read_number

MAX_ANSWER_CHARACTERS = 1000  # a longer final answer is wrong unless it is identical to the gold answer


@dataclass(frozen=True)
class Grade:
    """The grade of one response. If `strict` is True, `lenient` is True too."""

    strict: bool  # the last box contains the gold answer
    lenient: bool  # `strict`, or there is no box and the stated answer or the last number is the gold answer
    boxed: bool  # there is a complete, non-empty box
    extracted: (
        str | None
    )  # the compared text: the last box, else the stated answer, else the last number, else None


def grade(response_text: str, gold: str, equal: Callable[[str, str], bool] | None = None) -> Grade:
    """Grade a response with the comparison `equal` (default: `is_correct`); empty and unclosed boxes are
    ignored.

    If the gold answer is a list of n items, the last n boxes count as one list if they are in one sentence.
    """
    equal = equal or is_correct
    boxed = extract_boxed(response_text)
    if boxed is not None:
        correct = equal(boxed, gold)
        if not correct and (count := list_length(gold)) > 1:
            together = last_boxes(response_text, count)
            if together is not None and equal(", ".join(together), gold):
                boxed, correct = ", ".join(together), True
        return Grade(strict=correct, lenient=correct, boxed=True, extracted=boxed)
    stated = extract_stated(response_text)
    if stated is not None and equal(stated, gold):
        return Grade(strict=False, lenient=True, boxed=False, extracted=stated)
    number = extract_last_number(response_text)
    return Grade(
        strict=False, lenient=number is not None and equal(number, gold), boxed=False, extracted=number
    )


def is_correct(answer_text: str, gold: str) -> bool:
    """Return whether an extracted answer equals the gold answer by the rule of its kind (see `equality.py`).

    Does not raise on any text. An answer that is too long, or whose comparison takes too long, is wrong. No
    answer equals an empty gold answer.
    """
    answer, expected = normalize(answer_text), normalize(gold)
    if not answer or not expected:
        return False
    if answer == expected:
        return True
    if max(len(answer), len(expected)) > MAX_ANSWER_CHARACTERS:
        return False
    try:
        return are_equal(answer, expected)
    except RecursionError:
        return False


def answer_key(text: str) -> str:
    """Return a key that is the same for equal plain numbers and equal texts.

    Answers with different keys can still be equal.
    """
    normal = normalize(text)
    number = read_number(normal)
    return _show(number) if number is not None else normal


def list_length(gold: str) -> int:
    """Return the number of items if the gold answer is a list or a set, else 1."""
    normal = normalize(gold)
    brackets = structures.read_brackets(normal)
    if brackets is not None and brackets.opening == "\\{":
        normal = brackets.inside
    return len(structures.item_readings(normal)[0])


def _show(number: Fraction) -> str:
    # Python cannot convert integers of more than 4300 digits to decimal.
    return (
        str(number)
        if max(abs(number.numerator), number.denominator) < 10**1000
        else f"{number.numerator:x}/{number.denominator:x}"
    )
