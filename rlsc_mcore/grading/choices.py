"""Extract the letter that a response to a multiple choice question chooses."""

import re

from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.grading.latex import normalize, plain_text

LETTERS = "ABCDEFGHIJ"

_MARKUP = re.compile(r"[*_`$\"“”']+")
_FONT = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol)\s*\{([^{}]*)\}")
_LEAD = re.compile(
    r"(?:the|my|final|correct|right|best|most|likely|answer|answers|option|choice|letter|is|are|be|must|would|should|therefore|thus|clearly|so|hence"
    r"|:|=|,|-|\s)+",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?P<open>[\[({<]*)\s*(?P<letter>[A-Ja-j])\s*(?P<close>[\])}>]*)(?![A-Za-z0-9])(?P<rest>.*)", re.DOTALL
)
_SECOND_LETTER = re.compile(
    r"\s*(?:,|/|&|;|\+|\band\b|\bor\b|\s)+\s*(?:option|choice)?\s*(?:[\[({]\s*[A-Ja-j]\s*[\])}]|[A-J])(?=\s*(?:$|[.,;/&)\]}]|and\b|or\b))"
    r"|\s*[\[({]\s*[A-Ja-j]\s*[\])}]",
)
_LOWER_WORD = re.compile(r"\s+[a-z]{2,}")
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)s?(?:\s+(?:here|choice|option|letter))?\s*(?:is|:|=|must be|would be|should be|was)"
    r"|\b(?:must|should|would) be"
    r"|\b(?:choose|chose|pick|select|go with)(?:\s+(?:option|choice|answer))?)\s*:?\s*(?=(?P<answer>[^\n]{1,80}))",
    re.IGNORECASE,
)
_JUDGED = re.compile(
    r"(?:\b(?:option|choice|answer)\s+)?(?:\(([A-Ja-j])\)|\b([A-J]))\s+(?:is|must be)"
    r"\s+(?:the\s+)?(?:right|correct|best|true|answer|only)\b"
)
_CONCLUDED = re.compile(
    r"(?:\b(?:so|thus|hence|therefore|conclude|answer|option|choice|is|be)\b[\s,:]*)(?:\(([A-Ja-j])\)|([A-J]))[\s.]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LINE = re.compile(r"^\s*(?:[\[(]\s*([A-Ja-j])\s*[\])]|([A-J]))[\s.):]*$", re.MULTILINE)
_BRACKETED = re.compile(r"(?<![A-Za-z0-9'])\(([A-J])\)(?![A-Za-z0-9])")


def extract_choice(text: str) -> str | None:
    """Return the letter of a final answer such as `B`, `(b)`, `\\text{Option B}` or `B. 5 m/s`.

    Returns None if the answer names no letter or several. A lower-case letter counts only alone or in
    brackets, so the article `a` is not a choice.
    """
    plain = _MARKUP.sub(" ", plain_text(normalize(_MARKUP.sub(" ", text)))).strip()
    return _leading_letter(_LEAD.sub("", plain, count=1) if _LEAD.match(plain) else plain)


def find_choice(response: str) -> str | None:
    """Return the letter that a response without a box chooses; None if it names no letter or several."""
    text = _MARKUP.sub(" ", _FONT.sub(r"\1", response.replace("\\(", "").replace("\\)", "")))
    for match in reversed(list(_STATED.finditer(text))):
        answer = match["answer"].strip()
        lead = _LEAD.match(answer)
        answer = answer[lead.end() :] if lead else answer
        if _LETTER.match(answer) and _several(answer):
            return None
        letter = _leading_letter(answer)
        if letter is not None:
            return letter
    for pattern in (_JUDGED, _CONCLUDED, _LINE, _BRACKETED):
        letters = [next(group for group in match.groups() if group) for match in pattern.finditer(text)]
        letters = [letter for letter in letters if pattern is not _CONCLUDED or letter.isupper()]
        if letters:
            return letters[-1].upper()
    return None


def boxed_choice(response: str) -> tuple[str | None, str | None]:
    """Return the content of the last box and its letter; each is None if it does not exist."""
    boxed = extract_boxed(response)
    return boxed, None if boxed is None else extract_choice(boxed)


def _several(text: str) -> bool:
    match = _LETTER.match(text)
    return match is not None and _SECOND_LETTER.match(match["rest"]) is not None


def _leading_letter(text: str) -> str | None:
    match = _LETTER.match(text)
    if match is None or _several(text):
        return None
    letter, rest, bracketed = match["letter"], match["rest"], bool(match["open"] or match["close"])
    if not bracketed:
        if letter.islower() and rest.strip(" .,;:!") and not re.match(r"[.:)]", rest):
            return None
        if letter in "AI" and _LOWER_WORD.match(rest):  # "A catalyst", "I think"
            return None
    return letter.upper()
