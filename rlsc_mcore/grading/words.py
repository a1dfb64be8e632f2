"""Distinguish answers that are words from answers that are expressions, and compare words."""

import re

from rlsc_mcore.grading.latex import plain_text

_TWO_LETTER_WORDS = frozenset(
    [
        "no",
        "on",
        "or",
        "if",
        "is",
        "it",
        "of",
        "so",
        "to",
        "up",
        "us",
        "we",
        "be",
        "by",
        "do",
        "go",
        "he",
        "me",
        "my",
        "an",
        "as",
        "at",
        "in",
        "am",
    ]
)
_PRODUCTS = tuple(map(frozenset, ("abcd", "xyzw", "pqrst", "mnkl", "uvw", "ijk")))
_ROMAN = re.compile(
    r"(?=[MDCLXVI]{2,})M{0,3}(?:C[MD]|D?C{0,3})(?:X[CL]|L?X{0,3})(?:I[XV]|V?I{0,3})", re.IGNORECASE
)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ ',.:;/-]+[A-Za-z]+|[ ,.:-]+[0-9]+)*")
_TEXT = re.compile(r"\\text\{[^{}]*[A-Za-z]{2,}[^{}]*\}")
_TIME = re.compile(r"[0-9]{1,2}(?::[0-9]{2})? ?[apAP]\.? ?[mM]\.?")
_NAME = re.compile(r"[A-Z]{2,}")
_ARTICLE = re.compile(r"^(?:an?|the) (?=[a-z]{2})")
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*[).]?")


def is_words(text: str) -> bool:
    """Return whether a normalized text must be compared as words."""
    plain = plain_text(text)
    if "\\" in plain or re.search(r"[=^_+*<>|\[\]{}]", plain):
        return False
    if not plain.isascii() and re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", plain):
        return True
    if _TIME.fullmatch(plain):
        return True
    if _WORDS.fullmatch(plain):
        return not _is_product(text)
    if plain.casefold() in _TWO_LETTER_WORDS or _ROMAN.fullmatch(plain) or _NAME.fullmatch(plain):
        return True
    return text.startswith("\\text{") and not plain[:1].isdigit() and _TEXT.fullmatch(text) is not None


def same_words(first: str, second: str) -> bool:
    """Compare words without regard to case, punctuation and a leading article; names of points are
    case-sensitive."""
    a, b = plain_text(first), plain_text(second)
    if _NAME.fullmatch(a) or _NAME.fullmatch(b):
        short = min(len(a), len(b)) < 3 and a.casefold() not in _TWO_LETTER_WORDS and not _ROMAN.fullmatch(a)
        if short or _is_product(first) or _is_product(second):
            return a == b
    return _folded(a) == _folded(b)


def single_letter(text: str) -> str | None:
    """Return the letter of `B`, `(B)` or `\\text{B}`; None for anything else."""
    match = _LETTER.fullmatch(plain_text(text))
    return match[1] if match else None


def _is_product(text: str) -> bool:
    """Return whether letters such as `abc` or `xyz` are a product of variables and not a word."""
    letters = set(text)
    return (
        "\\" not in text
        and len(letters) == len(text)
        and text.islower()
        and any(letters <= variables for variables in _PRODUCTS)
    )


def _folded(text: str) -> str:
    plain = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", text.casefold())  # a.m.
    plain = re.sub(r"[^\w\s+-]|_", " ", plain)
    return _ARTICLE.sub("", " ".join(plain.replace("-", " ").split()))
