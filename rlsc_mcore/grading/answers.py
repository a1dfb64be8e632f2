"""Grading: take the final answer out of a response and compare it with the gold answer."""

import os
import re
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction

from rlsc_mcore.grading.symbolic import compare_symbolically

MAX_ANSWER_CHARACTERS = 1000  # a longer final answer is wrong unless it is the gold text itself

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<open>\{)|[ \t]+(?P<bare>[-+]?[0-9][0-9.,/]*))|(?P<escaped>\\[{}])|(?P<brace>[{}])")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
_LATEX_FRACTION = r"\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
_LAST_NUMBER = re.compile(
    rf"[\^_]\{{?[-+]?[0-9.]+|(?P<number>(?:(?<![\w)\]}}])[-+])?(?:{_LATEX_FRACTION}|{_DECIMAL}(?:/[0-9]+(?!\.?[0-9]))?))"
)
_PLAIN_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<decimal>{_DECIMAL})(?:/(?P<over>[0-9]+))?|\\frac\{{(?P<top>[0-9]+)\}}\{{(?P<bottom>[0-9]+)\}})"
)
_MAX_PLAIN_CHARACTERS = 100

_SPACING = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad\b")
_GROUP_SPACING = re.compile(r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))")
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])")
_SIZING = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])\s*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*")
_NUMBER_WITH_UNIT = re.compile(r"(?P<number>[-+]?[0-9][0-9.,/]*)\s+(?P<unit>[A-Za-z]{2,}(?: [A-Za-z]+)*)\.?")
_NOT_UNITS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|pi|percent|half|halves|thirds?|quarters?|squared|cubed|factorial"
    r"|plus|minus|times|over|mod|base|sqrt|log|ln|sin|cos|tan|and|or|to)\b"
)


@dataclass(frozen=True)
class Grade:
    """How one response fared against the gold answer. `lenient` holds wherever `strict` does."""

    strict: bool  # the last box holds the gold answer
    lenient: bool  # the same, or nothing is boxed and the last number anywhere is the gold answer
    boxed: bool  # a box with something in it was closed
    extracted: str | None  # what was compared: the last box, else the last number, else None


class _Verdicts:
    """Remembers symbolic comparisons; a pair that another thread is comparing already is waited for, not compared again."""

    def __init__(self, most: int = 65536) -> None:
        self._most = most
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # the lock may be held, and threads that owe a verdict do not fork

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Future[bool]] = {}

    def of(self, answer: str, gold: str) -> bool:
        """Compare in a worker, once."""
        with self._lock:
            verdict = self._known.get((answer, gold))
            is_new = verdict is None
            if verdict is None:
                if len(self._known) >= self._most:
                    del self._known[next(iter(self._known))]
                verdict = self._known[answer, gold] = Future()
        if is_new:
            try:
                verdict.set_result(compare_symbolically(answer, gold))
            except BaseException as error:
                with self._lock:
                    self._known.pop((answer, gold), None)
                verdict.set_exception(error)
        return verdict.result()


_verdicts = _Verdicts()


def grade(response_text: str, gold: str) -> Grade:
    """Grade a response. A box that is empty or never closed counts as none."""
    boxed = extract_boxed(response_text)
    if boxed is not None:
        correct = is_correct(boxed, gold)
        return Grade(strict=correct, lenient=correct, boxed=True, extracted=boxed)
    number = extract_last_number(response_text)
    return Grade(strict=False, lenient=number is not None and is_correct(number, gold), boxed=False, extracted=number)


def extract_boxed(text: str) -> str | None:
    r"""Return what the last complete, non-empty \boxed{...} or \fbox{...} holds; of nested boxes the innermost.

    Braces balance, \{ and \} apart. A number after `\boxed` without braces counts too: prompts that ask for `\boxed` invite it.
    """
    last_start, last_content = -1, None
    open_boxes: list[int | None] = []  # where each open group's content starts if it is a box
    for match in _BOX_OR_BRACE.finditer(text):
        start: int | None = None
        content = ""
        if match["bare"]:
            start, content = match.start(), match["bare"].rstrip(".,;:")
        elif match["open"]:
            open_boxes.append(match.end())
        elif match["brace"] == "{":
            open_boxes.append(None)
        elif match["brace"] == "}" and open_boxes:
            start = open_boxes.pop()
            content = text[start : match.start()].strip() if start is not None else ""
        if start is not None and content and start > last_start:
            last_start, last_content = start, content
    return last_content


def extract_last_number(text: str) -> str | None:
    r"""Return the last number of the text as it is written: 1,234.5, -3, 2/3 or \frac{2}{3}; exponents and indices are none."""
    last = None
    for match in _LAST_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        last = match["number"] or last
    return last


def is_correct(answer_text: str, gold: str) -> bool:
    """Say whether an extracted answer equals the gold answer.

    Plain numbers (integers, decimals, thousands separators, simple fractions) compare exactly and fast, words by letters,
    everything else symbolically by math-verify (algebra, sets, intervals, units). Never raises on any text; an answer that
    is too long or takes too long is wrong. An empty gold answer is matched by nothing.
    """
    answer, expected = _normalize(answer_text), _normalize(gold)
    if not answer or not expected:
        return False
    if answer == expected:
        return True
    if max(len(answer), len(expected)) > MAX_ANSWER_CHARACTERS:
        return False
    number, expected_number = _to_number(answer), _to_number(expected)
    if number is not None and expected_number is not None:
        return number == expected_number
    answer_words, expected_words = _unwrap_text(answer), _unwrap_text(expected)
    if _WORDS.fullmatch(expected_words):  # to algebra a word is a product of letters, equal to its anagrams
        return answer_words.casefold() == expected_words.casefold()
    if expected_number is not None and (with_unit := _NUMBER_WITH_UNIT.fullmatch(answer_words)):
        return not _NOT_UNITS.search(with_unit["unit"].lower()) and _to_number(with_unit["number"]) == expected_number
    return _verdicts.of(answer, expected)


def answer_key(text: str) -> str:
    """Return a spelling that equal plain numbers and equal texts share; unequal keys may still be equal answers."""
    normal = _normalize(text)
    number = _to_number(normal)
    return str(number) if number is not None else normal


def _normalize(text: str) -> str:
    if len(text) > 20 * MAX_ANSWER_CHARACTERS:
        return text
    text = text.strip()
    for opening, closing in _DELIMITERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    if "\\" in text or "$" in text or "~" in text:
        text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        text = _SPACING.sub(" ", _GROUP_SPACING.sub("", text.replace("\\!", "")))
        text = _SIZING.sub("", text).replace("\\$", "").replace("$", "")
    return " ".join(text.split()).rstrip(". ")


def _to_number(text: str) -> Fraction | None:
    match = _PLAIN_NUMBER.fullmatch(text) if len(text) <= _MAX_PLAIN_CHARACTERS else None
    if match is None:
        return None
    numerator = Fraction((match["decimal"] or match["top"]).replace(",", ""))
    denominator = int(match["over"] or match["bottom"] or 1)
    if denominator == 0:
        return None
    return (-numerator if match["sign"] == "-" else numerator) / denominator


def _unwrap_text(text: str) -> str:
    return " ".join(_TEXT_COMMAND.sub(r" \1", text).split()).rstrip(".")
