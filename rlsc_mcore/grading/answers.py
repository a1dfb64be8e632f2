"""Grade a response against the gold answer; `equality.py` says when two answers are equal."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rlsc_mcore.grading import structures
from rlsc_mcore.grading.equality import are_equal
from rlsc_mcore.grading.extraction import extract_boxed, extract_last_number, extract_stated, last_boxes
from rlsc_mcore.grading.latex import normalize
from rlsc_mcore.grading.numbers import read_number

MAX_ANSWER_CHARACTERS = 1000  # a longer final answer is wrong unless it is the gold text itself


@dataclass(frozen=True)
class Grade:
    """How one response fared against the gold answer. `lenient` holds wherever `strict` does."""

    strict: bool  # the last box holds the gold answer
    lenient: bool  # the same, or nothing is boxed and the stated answer or the last number is the gold answer
    boxed: bool  # a box with something in it was closed
    extracted: (
        str | None
    )  # what was compared: the last box, else the stated answer, else the last number, else None


def grade(response_text: str, gold: str, equal: Callable[[str, str], bool] | None = None) -> Grade:
    """Grade a response by `equal` (`is_correct` by default). A box that is empty or never closed counts as
    none.

    Where the gold answer is a list of n items, n boxes in the last sentence with boxes count as one list.
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
    """Say whether an extracted answer equals the gold answer, by the rule of its kind (see `equality.py`).

    Never raises on any text; an answer that is too long or takes too long is wrong. An empty gold answer is
    matched by nothing.
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
    """Return a spelling that equal plain numbers and equal texts share; unequal keys may still be equal
    answers."""
    normal = normalize(text)
    number = read_number(normal)
    return _show(number) if number is not None else normal


def list_length(gold: str) -> int:
    """Return how many items a gold answer has that is a list or a set; 1 for anything else."""
    normal = normalize(gold)
    brackets = structures.read_brackets(normal)
    if brackets is not None and brackets.opening == "\\{":
        normal = brackets.inside
    return len(structures.item_readings(normal)[0])


def _show(number: Fraction) -> str:
    # Python refuses to print integers of more than 4300 digits.
    return (
        str(number)
        if max(abs(number.numerator), number.denominator) < 10**1000
        else f"{number.numerator:x}/{number.denominator:x}"
    )
