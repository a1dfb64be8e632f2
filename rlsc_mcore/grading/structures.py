"""Parse the structure of a normalized answer: brackets, items, relations, intervals, matrices."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlsc_mcore.grading.expressions import number_value
from rlsc_mcore.grading.latex import unwrap

_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}
_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_MATRIX = re.compile(r"\(?\\begin\{(p|b|small|v|B|)matrix\}(.*)\\end\{\1matrix\}\)?", re.DOTALL)
_ARRAY = re.compile(r"[(\[]?\\begin\{array\}\{[^{}]*\}(.*)\\end\{array\}[)\]]?", re.DOTALL)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|to)(?![A-Za-z])|[=<>]")
_CONJUNCTION = re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|\b(?:and|or)\b")
_ONE_NAME = re.compile(
    r"(?:[A-Za-z]|[A-Z]{2,4}|\\[A-Za-z]+|\\text\{[^{}]*\}|\|[A-Z]{2}\||\\angle ?[A-Z]+|\\(?:vec|overline|hat|bar|text)\{[^{}]*\})"
    r"(?:_ ?(?:\{(?:[^{}]|\{[^{}]*\})*\}|[A-Za-z0-9]))?'*(?: ?\([^()=]*\))?'*"
)
_KNOWN_FUNCTION = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc|ln|log|exp|arc[a-z]+|pi|infty|frac|sqrt|begin|R|emptyset)(?![A-Za-z])"
)


@dataclass(frozen=True)
class Brackets:
    """The brackets around a text and the text inside."""

    opening: str  # ( [ ] or \\{
    closing: str
    inside: str


@dataclass(frozen=True)
class Interval:
    """An interval of the real line; an end of None is infinite."""

    low: str | None
    high: str | None
    low_closed: bool
    high_closed: bool


def tokens(text: str) -> list[str]:
    """Split a text into `\\text{...}` commands, other commands and characters."""
    return _TOKEN.findall(text)


def split_items(text: str) -> list[str]:
    """Split a text at commas, semicolons and conjunctions outside of brackets."""
    items, current, depth = [], "", 0
    for token in tokens(_plain_conjunctions(text)):
        if token in ("{", "(", "[", "\\{", "\\langle", "\\begin", "\\lfloor"):
            depth += 1
        elif token in ("}", ")", "]", "\\}", "\\rangle", "\\end", "\\rfloor"):
            depth -= 1
        if depth <= 0 and (token in (",", ";") or _CONJUNCTION.fullmatch(token)):
            items.append(current)
            current = ""
        else:
            current += token
    return [item.strip() for item in [*items, current] if item.strip()]


def item_readings(text: str) -> list[list[str]]:
    """Return the one or two ways to split a list: with and without splitting at possible thousands
    separators."""
    readings = [split_items(text)]
    if _GROUPED.search(text):
        joined = split_items(_GROUPED.sub(lambda match: match[0].replace(",", ""), text))
        if joined != readings[0]:
            readings.insert(0, joined)
    return [expand_signs(reading) for reading in readings]


def expand_signs(items: Sequence[str]) -> list[str]:
    """Replace each item with a plus-minus sign by its two values."""
    expanded = []
    for item in items:
        if "\\pm" in item or "\\mp" in item:
            upper = re.sub(r"\\mp(?![A-Za-z]) ?", "-", re.sub(r"\\pm(?![A-Za-z]) ?", "+", item))
            lower = re.sub(r"\\mp(?![A-Za-z]) ?", "+", re.sub(r"\\pm(?![A-Za-z]) ?", "-", item))
            expanded += [upper.lstrip("+ "), lower.lstrip("+ ")]
        else:
            expanded.append(item)
    return expanded


def read_brackets(text: str) -> Brackets | None:
    """Return the brackets around the whole text, or None; `]1,2[` is the open interval (1,2)."""
    for opening, closing in (*_OPENING.items(), ("]", "["), ("(", "]"), ("[", ")")):
        if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(
            closing
        ):
            continue
        inside = text[len(opening) : len(text) - len(closing)].strip()
        if not _balanced(inside):
            continue
        if opening == "\\langle":
            return Brackets("(", ")", inside)
        return Brackets("(", ")", inside) if opening == "]" else Brackets(opening, closing, inside)
    return None


def read_matrix(text: str) -> tuple[str, list[list[str]]] | None:
    """Return "matrix" or "determinant" and the cells by row; None if the text is neither."""
    match = _MATRIX.fullmatch(text) or _ARRAY.fullmatch(text)
    if match is None:
        return None
    body = match[match.lastindex or 0]
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", body) if row.strip()]
    kind = "determinant" if match.re is _MATRIX and match[1] == "v" else "matrix"
    return kind, [[unwrap(cell.strip()) for cell in row.split("&")] for row in rows]


def read_relation(text: str) -> tuple[list[str], list[str]] | None:
    """Return the sides and the relation signs between them; None if no relation is outside of brackets."""
    sides, signs, current, depth = [], [], "", 0
    for token in tokens(text):
        if token in ("{", "(", "[", "\\{"):
            depth += 1
        elif token in ("}", ")", "]", "\\}"):
            depth -= 1
        if depth <= 0 and _RELATION.fullmatch(token):
            sides.append(current.strip())
            signs.append(token.strip())
            current = ""
        else:
            current += token
    if not signs or not all([*sides, current.strip()]):
        return None
    return [*sides, current.strip()], signs


def is_name(text: str) -> bool:
    """Return whether a text names one quantity, like the left side of `x = 5`, `f(x) = 2x` or `AB = 3`."""
    if re.fullmatch(r"\\text\{[^{}]*\}|[A-Za-z]{3,}(?: [A-Za-z]+)*|\([A-Za-z](?:, ?[A-Za-z])+\)", text):
        return True
    parts = text.split(":")
    if len(parts) > 1:
        return all(is_name(part.strip()) for part in parts)
    if re.fullmatch(r"\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}|[A-Z]{2} ?/ ?[A-Z]{2}", text):
        return True
    if re.fullmatch(r"\|[A-Za-z]{1,3}\||\\?# ?[A-Za-z]+", text):  # the size of a set
        return True
    return _ONE_NAME.fullmatch(text) is not None and not _KNOWN_FUNCTION.match(text)


def read_real_set(text: str) -> list[Interval] | None:
    """Parse a union of intervals and finite sets, or inequalities in one letter; None for any other text.

    The returned intervals are sorted and do not touch.
    """
    text = text.strip()
    if re.search(r"\\setminus|\\ne(?![A-Za-z])", text):
        return _read_punctured(text)
    pieces: list[Interval] = []
    parts = _split_union(text)
    letters = set()
    for part in parts:
        piece = _read_piece(part)
        if piece is None:
            return None
        pieces += piece[0]
        letters |= piece[1]
    return _merged(pieces) if len(letters) <= 1 and pieces else None


def same_real_set(first: list[Interval], second: list[Interval], same: Callable[[str, str], bool]) -> bool:
    """Return whether two unions of intervals have the same ends."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if (a.low_closed, a.high_closed, a.low is None, a.high is None) != (
            b.low_closed,
            b.high_closed,
            b.low is None,
            b.high is None,
        ):
            return False
        if a.low is not None and b.low is not None and not same(a.low, b.low):
            return False
        if a.high is not None and b.high is not None and not same(a.high, b.high):
            return False
    return True


def _plain_conjunctions(text: str) -> str:
    return re.sub(r"(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z}])", lambda match: f"\\text{{{match[0]}}}", text)


def _balanced(text: str) -> bool:
    depth = 0
    for token in tokens(text):
        if token in ("(", "[", "{", "\\{", "\\langle"):
            depth += 1
        elif token in (")", "]", "}", "\\}", "\\rangle"):
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


def _split_union(text: str) -> list[str]:
    parts, current, depth = [], "", 0
    for token in tokens(_plain_conjunctions(text)):
        if token in ("{", "(", "[", "\\{"):
            depth += 1
        elif token in ("}", ")", "]", "\\}"):
            depth -= 1
        if depth == 0 and (token == "\\cup" or token == "\\text{or}"):
            parts.append(current.strip())
            current = ""
        else:
            current += token
    return [*parts, current.strip()]


def _read_piece(text: str) -> tuple[list[Interval], set[str]] | None:
    """Return the intervals of one part of a union and the set of its letters (at most one); None if
    unreadable."""
    if text in ("\\R", "(-\\infty,\\infty)"):
        return [Interval(None, None, False, False)], set()
    relation = read_relation(text)
    if relation is not None:
        return _read_inequality(*relation)
    brackets = read_brackets(text)
    if brackets is None:
        return None
    if brackets.opening == "\\{":
        for separator in ("\\mid", "|", ":"):
            head, found, condition = brackets.inside.partition(separator)
            if found and re.fullmatch(r"[A-Za-z](?: ?\\in ?\\R)?", head.strip()):
                return _read_piece(condition.strip())
        items = split_items(brackets.inside)
        if any(number_value(item) is None for item in items):
            return None
        return [Interval(item, item, True, True) for item in items], set()
    items = split_items(brackets.inside)
    if len(items) != 2:
        return None
    if not _is_end(items[0], -1) or not _is_end(items[1], 1):
        return None
    low, high = (None if "\\infty" in item else item for item in items)
    return [Interval(low, high, brackets.opening == "[", brackets.closing == "]")], set()


def _is_end(text: str, direction: int) -> bool:
    """Return whether a text is a number, or the infinity with the sign of `direction`."""
    infinite = ("-\\infty",) if direction < 0 else ("\\infty", "+\\infty")
    return text.replace(" ", "") in infinite or number_value(text) is not None


def _read_inequality(sides: list[str], signs: list[str]) -> tuple[list[Interval], set[str]] | None:
    if signs == ["\\in"] and is_name(sides[0]):
        piece = read_real_set(sides[1])
        return None if piece is None else (piece, {sides[0]})
    upward, downward = {"<", "\\le"}, {">", "\\ge"}
    if set(signs) <= downward:
        sides, signs = sides[::-1], [{">": "<", "\\ge": "\\le"}[sign] for sign in reversed(signs)]
    if not set(signs) <= upward or len(signs) > 2:
        return None
    if len(signs) == 2:
        low, name, high = sides
        if not is_name(name) or number_value(name) is not None:
            return None
        if not _is_end(low, -1) or not _is_end(high, 1):
            return None
        low_end, high_end = (None if "\\infty" in end else end for end in (low, high))
        low_closed, high_closed = (
            sign == "\\le" and "\\infty" not in end for sign, end in zip(signs, (low, high), strict=True)
        )
        return [Interval(low_end, high_end, low_closed, high_closed)], {name}
    left, right = sides
    if is_name(left) and number_value(right) is not None:
        return [Interval(None, right, False, signs[0] == "\\le")], {left}
    if is_name(right) and number_value(left) is not None:
        return [Interval(left, None, signs[0] == "\\le", False)], {right}
    return None


def _read_punctured(text: str) -> list[Interval] | None:
    """Parse `\\R \\setminus \\{1, 2\\}` or `x \\ne 1` as open intervals; None for any other text."""
    text = re.sub(r"^[A-Za-z] ?\\in ?", "", text)
    outside = re.fullmatch(r"(?:\\R|\(-\\infty ?, ?\\infty\)) ?\\setminus ?\\\{(.*)\\\}", text)
    unequal = re.fullmatch(r"([A-Za-z]) ?\\ne ?(.*)", text)
    if outside is None and unequal is None:
        return None
    holes = split_items(outside[1] if outside is not None else unequal[2])  # type: ignore[index]
    values = [(number_value(hole), hole) for hole in holes]
    if not values or any(value is None for value, _ in values):
        return None
    ends = [None, *(hole for _, hole in sorted(values, key=lambda pair: pair[0] or 0.0)), None]
    return [Interval(low, high, False, False) for low, high in pairwise(ends)]


def _merged(pieces: list[Interval]) -> list[Interval]:
    def low(piece: Interval) -> tuple[float, bool]:
        return (float("-inf") if piece.low is None else number_value(piece.low) or 0.0, not piece.low_closed)

    def high(piece: Interval) -> float:
        return float("inf") if piece.high is None else number_value(piece.high) or 0.0

    merged: list[Interval] = []
    for piece in sorted(pieces, key=low):
        if merged and merged[-1].high is None:
            continue
        last = merged[-1] if merged else None
        if last is not None and (
            low(piece)[0] < high(last)
            or (low(piece)[0] == high(last) and (piece.low_closed or last.high_closed))
        ):
            longer = piece if (high(piece), piece.high_closed) > (high(last), last.high_closed) else last
            merged[-1] = Interval(last.low, longer.high, last.low_closed, longer.high_closed)
        else:
            merged.append(piece)
    return merged
