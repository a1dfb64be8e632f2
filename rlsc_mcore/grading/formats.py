"""Grade responses by the answer format of the question: math, multiple choice, lists, numbers with
tolerance."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rlsc_mcore.grading.answers import Grade, grade, is_correct
from rlsc_mcore.grading.choices import boxed_choice, extract_choice, find_choice
from rlsc_mcore.grading.expressions import number_value
from rlsc_mcore.grading.latex import normalize
from rlsc_mcore.grading.official import grade_official, grade_official_choice
from rlsc_mcore.grading.structures import item_readings, read_relation
from rlsc_mcore.grading.symbolic import NUM_WORKERS
from rlsc_mcore.grading.units import split_measure
from rlsc_mcore.types import Question

GRADERS = ("boxed", "lenient", "qwen")

__all__ = ["GRADERS", "extract_choice", "grade_answer", "grade_answers"]


def grade_answers(
    responses: Sequence[str], questions: Sequence[Question], grader: str = "boxed"
) -> list[Grade]:
    """Grade each response against the question at the same position.

    Identical pairs are graded once. Symbolic comparisons run in several worker processes.
    """
    pairs = list(zip(responses, questions, strict=True))
    distinct = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        grades = dict(
            zip(
                distinct,
                threads.map(lambda pair: grade_answer(pair[0], pair[1], grader), distinct),
                strict=True,
            )
        )
    return [grades[pair] for pair in pairs]


def grade_answer(response: str, question: Question, grader: str = "boxed") -> Grade:
    """Grade a response by the answer format of the question.

    `grader` selects the rule for `strict`. `boxed`: only the last box counts. `lenient`: without a box, the
    stated answer or the last number counts. `qwen`: the rule of the Qwen2.5-Math evaluation script (see
    `official.py`).
    """
    gold = question.answer or ""
    is_choice = question.answer_format == "choice"
    if grader == "qwen":
        return grade_official_choice(response, gold) if is_choice else grade_official(response, gold)
    result = (
        _grade_choice(response, gold)
        if is_choice
        else grade(response, gold, partial(_is_right, tolerance=question.tolerance))
    )
    if grader == "lenient" and result.lenient and not result.strict:
        return Grade(strict=True, lenient=True, boxed=result.boxed, extracted=result.extracted)
    return result


def _grade_choice(response: str, gold: str) -> Grade:
    boxed, letter = boxed_choice(response)
    if boxed is not None:
        return Grade(strict=letter == gold, lenient=letter == gold, boxed=True, extracted=letter or boxed)
    letter = find_choice(response)
    return Grade(strict=False, lenient=letter == gold, boxed=False, extracted=letter)


def _is_right(answer: str, gold: str, *, tolerance: float | None) -> bool:
    return is_correct(answer, gold) or (tolerance is not None and _is_close(answer, gold, tolerance))


def _is_close(answer: str, gold: str, tolerance: float) -> bool:
    """Compare numbers and constant expressions within an absolute tolerance; lists in any order."""
    for golds in map(_values, item_readings(normalize(gold))):
        for answers in map(_values, item_readings(normalize(answer))):
            # 1 % more, so that a difference equal to the tolerance passes despite rounding.
            if (
                golds
                and answers
                and len(answers) == len(golds)
                and _all_within(answers, golds, 1.01 * tolerance)
            ):
                return True
    return False


def _all_within(answers: list[float], golds: list[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(sorted(answers), sorted(golds), strict=True))


def _values(items: Sequence[str]) -> list[float] | None:
    values = []
    for item in items:
        relation = read_relation(item)
        measure = split_measure(
            relation[0][-1] if relation is not None and set(relation[1]) <= {"=", "\\approx"} else item
        )
        value = number_value(measure.core)
        if value is None:
            return None
        values.append(value)
    return values
