"""Answer formats beside a single expression: multiple choice letters, lists, and numbers with a tolerance."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

from rlsc_mcore.grading.answers import Grade, extract_boxed, grade, is_correct
from rlsc_mcore.grading.symbolic import NUM_WORKERS
from rlsc_mcore.types import Question

MOST_PERMUTED = 6  # answers of a list that are matched in every order; longer lists in theirs

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[\[({]*([A-J])(?:[\])}.:,]+.*|\s*)", re.DOTALL)
_STATED = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+|choice\s+)?[\[(*]*([A-J])\b", re.IGNORECASE)
_LONE = re.compile(r"(?<![A-Za-z'])\(?([A-J])\)(?![A-Za-z])|^\s*([A-J])[.\s]*$", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_POWER = re.compile(r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([-+]?[0-9]{1,3})\s*\}?")


def grade_answers(responses: Sequence[str], questions: Sequence[Question]) -> list[Grade]:
    """Grade many responses, each by the question at its place: identical ones once, algebra in several worker processes."""
    pairs = list(zip(responses, questions, strict=True))
    distinct = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        grades = dict(zip(distinct, threads.map(lambda pair: grade_answer(*pair), distinct), strict=True))
    return [grades[pair] for pair in pairs]


def grade_answer(response: str, question: Question) -> Grade:
    """Grade a response by the question's own answer format."""
    gold = question.answer or ""
    if question.answer_format == "choice":
        return _grade_choice(response, gold)
    result = grade(response, gold)
    if result.strict or result.extracted is None or (result.lenient and not result.boxed):
        return result
    if not _is_close(result.extracted, gold, question.tolerance) and not _is_same_list(result.extracted, gold):
        return result
    return Grade(strict=result.boxed, lenient=True, boxed=result.boxed, extracted=result.extracted)


def extract_choice(text: str) -> str | None:
    """Return the letter that a final answer such as `B`, `(B)`, `\\text{B}` or `B. 5 m/s` names; None where it names none."""
    plain = _TEXT.sub(r"\1", text).replace("$", "").strip()
    match = _LETTER.fullmatch(plain)
    return match[1] if match else None


def _grade_choice(response: str, gold: str) -> Grade:
    boxed = extract_boxed(response)
    if boxed is not None:
        letter = extract_choice(boxed)
        return Grade(strict=letter == gold, lenient=letter == gold, boxed=True, extracted=letter or boxed)
    stated = _STATED.findall(response)
    lone = [first or second for first, second in _LONE.findall(response)]
    letter = stated[-1].upper() if stated else lone[-1] if lone else None
    return Grade(strict=False, lenient=letter == gold, boxed=False, extracted=letter)


def _is_close(answer: str, gold: str, tolerance: float | None) -> bool:
    """Compare numbers within an absolute tolerance, one by one in any order."""
    if tolerance is None:
        return False
    answers, golds = _numbers(answer), _numbers(gold)
    if not golds or len(answers) != len(golds):
        return False
    # A hundredth more: the bound itself counts, whatever its last binary digit.
    return all(abs(a - b) <= 1.01 * tolerance for a, b in zip(sorted(answers), sorted(golds), strict=True))


def _is_same_list(answer: str, gold: str) -> bool:
    """Match lists item by item: in any order where short, since several solutions of one problem have none."""
    answers, golds = _items(answer), _items(gold)
    if len(golds) < 2 or len(answers) != len(golds):
        return False
    orders = permutations(answers) if len(answers) <= MOST_PERMUTED else [tuple(answers)]
    table = {(a, b): is_correct(a, b) for a in set(answers) for b in set(golds)}
    return any(all(table[pair] for pair in zip(order, golds, strict=True)) for order in orders)


def _numbers(text: str) -> list[float]:
    found = []
    for item in _items(text):
        plain = _TEXT.sub("", item).replace("$", "").replace("\\%", "").replace("\\,", "").strip()
        match = _NUMBER.match(plain)
        if match is None:
            return []
        value = float(match[0].replace(",", ""))
        power = _POWER.match(plain, match.end())
        rest = plain[power.end() if power else match.end() :].strip()
        if rest and not re.fullmatch(r"[A-Za-z/^{}0-9.\\ -]{1,30}", rest):  # what may follow is a unit
            return []
        found.append(value * 10.0 ** int(power[1]) if power else value)
    return found


def _items(text: str) -> list[str]:
    """Split at commas, semicolons and `and` outside of brackets; thousands separators are no commas."""
    items, depth, current = [], 0, ""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.strip().strip("$"))
    for token in re.split(r"(\\?[{}()\[\],;]|\band\b|\\text\{\s*and\s*\})", text):
        if token in ("{", "(", "[", "\\{", "\\[", "\\("):
            depth += 1
        elif token in ("}", ")", "]", "\\}", "\\]", "\\)"):
            depth -= 1
        is_separator = token in (",", ";", "and") or token.replace(" ", "") == "\\text{and}"
        if is_separator and depth == 0:
            items.append(current)
            current = ""
        else:
            current += token
    return [item.strip().strip("$").strip() for item in [*items, current] if item.strip()]
