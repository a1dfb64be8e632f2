r"""Find the final answer in a response: the last box, the stated answer, the last number."""

import re
from itertools import pairwise

_BOX_OR_BRACE = re.compile(
    r"\\(?:boxed|fbox)(?:\s*(?P<open>\{)|[ \t]*(?P<bare>(?=[^\s{A-Za-z]|[ \t]|(?<=[ \t])[A-Za-z])[^\n]*))"
    r"|(?P<escaped>\\[{}])|(?P<brace>[{}])"
)
_BARE_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9.,/]*|\.[0-9]+)(?:\s*\\?%)?")
_BARE_COMMAND = re.compile(
    r"[-+]?[0-9]*\\[A-Za-z]+(?:\[[^\]]*\])?(?:\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[0-9A-Za-z]{1,2}(?![A-Za-z])))*"
)
_MATH_END = re.compile(r"(?<!\\)\$|\\[)\]]")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?:[ \u00a0\u202f\u2009][0-9]{3})+(?![0-9.]|\s*[0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
_POWER = r"(?:\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*(?:\{[-+]?[0-9]{1,4}\}|[-+]?[0-9]{1,4}))"
_LATEX_FRACTION = r"\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
_LAST_NUMBER = re.compile(
    rf"[\^_]\{{?[-+]?[0-9.]+"
    rf"|(?P<number>(?:(?<![\w)\]}}])[-+])?(?:{_LATEX_FRACTION}|{_DECIMAL}(?:{_POWER}|/[0-9]+(?!\.?[0-9]))?))"
)
_STATED = re.compile(r"\banswer\s*(?:is|:)\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete, non-empty \boxed{...} or \fbox{...}, or None.

    Of nested boxes the innermost counts. Braces must balance; \{ and \} are ignored. Without braces the
    content is the formula that follows up to the end of the math, or in plain text the number or command that
    follows. Prompts that ask for `\boxed` lead models to write this form.
    """
    boxes = find_boxes(text)
    return boxes[-1][1] if boxes else None


def find_boxes(text: str) -> list[tuple[int, str]]:
    """Return (position, content) of every complete, non-empty box, sorted by position."""
    found: list[tuple[int, str]] = []
    open_boxes: list[int | None] = []  # per open group: start of the content of a box, None for other groups
    position = 0
    while match := _BOX_OR_BRACE.search(text, position):
        position = match.end()
        if match["bare"] is not None and not match["open"]:
            position = match.start("bare")
            content = _bare_content(match["bare"])
            if content:
                found.append((match.start(), content))
        elif match["open"]:
            open_boxes.append(match.end())
        elif match["brace"] == "{":
            open_boxes.append(None)
        elif match["brace"] == "}" and open_boxes:
            start = open_boxes.pop()
            content = text[start : match.start()].strip() if start is not None else ""
            if start is not None and content:
                found.append((start, content))
    return sorted(found)


def last_boxes(text: str, count: int) -> list[str] | None:
    """Return the contents of the last `count` boxes if they are in one sentence and not nested, else None."""
    boxes = find_boxes(text)[-count:]
    if len(boxes) < count:
        return None
    for (start, content), (next_start, _) in pairwise(boxes):
        between = text[start + len(content) : next_start]
        if next_start < start + len(content) or _SENTENCE_END.search(
            between.replace("\\boxed", "").rstrip("{ ")
        ):
            return None
    return [content for _, content in boxes]


def extract_stated(text: str) -> str | None:
    """Return the answer of the last "the answer is ..." if it is a formula or a short text, else None.

    A text with more than one word of three or more letters is a sentence and not an answer.
    """
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    answer = matches[-1]["answer"].strip().strip("*").strip()
    formula = re.match(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", answer)
    if formula:
        return next(part for part in formula.groups() if part).strip()
    end = _SENTENCE_END.search(answer)
    answer = (answer[: end.start()] if end else answer).strip().strip("*").strip()
    return answer if answer and len(answer) <= 60 and len(_WORD.findall(answer)) <= 1 else None


def extract_last_number(text: str) -> str | None:
    r"""Return the last number as it is written: 1,234.5, -3, 2/3 or \frac{2}{3}; None if there is none.

    Exponents and indices are not numbers here.
    """
    last = None
    for match in _LAST_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        last = match["number"] or last
    return last


def _bare_content(rest: str) -> str | None:
    rest = rest.strip()
    end = _MATH_END.search(rest)
    if end is not None:
        content = rest[: end.start()].strip()
        if content and not _WORD.search(content):
            return content.rstrip(".,;:") or None
    match = _BARE_NUMBER.match(rest) or _BARE_COMMAND.match(rest)
    return match[0].rstrip(".,;: ") or None if match else None
