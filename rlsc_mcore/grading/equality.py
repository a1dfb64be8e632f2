"""Decide whether two normalized answers are equal.

Each kind of answer has one rule, which is tried before math-verify:

- numbers are compared as exact rationals in any notation, without rounding;
- a percentage equals the same number with or without the percent sign, and its value as a fraction;
- a unit on one side only is ignored; two known units are converted; other units must agree;
- numbers in a base are equal digit by digit in the same base;
- tuples, vectors, intervals and matrices agree item by item, brackets included; sets and lists in any order;
- unions of intervals and inequalities in one letter are compared as sets;
- equations are equal where one is a multiple of the other; `x = 5` also equals `5`;
- words are compared without regard to case;
- other expressions are equal if their values agree, and letters are case-sensitive; math-verify decides the
rest.
"""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from fractions import Fraction

from rlsc_mcore.grading import structures
from rlsc_mcore.grading.expressions import is_constant, proportional, same_expression
from rlsc_mcore.grading.latex import compact
from rlsc_mcore.grading.numbers import read_base_number, read_number
from rlsc_mcore.grading.symbolic import compare_symbolically
from rlsc_mcore.grading.units import same_unit, split_measure
from rlsc_mcore.grading.words import is_words, same_words, single_letter

_MAX_DEPTH = 6
_MAX_ITEMS = 40

_ELLIPSIS = "\\ldots"
_OPEN_END = re.compile(
    r"(?:^| )[-+*/=<>]|(?:[-+*/=<>]|\\(?:cdot|times|le|ge))(?: |$)|(?:^| )\\(?:cdot|times|le|ge)"
)
_INFINITE = re.compile(r"[-+]? ?\\infty")
_MEMBER = re.compile(r"^[A-Za-z] ?\\in ?(?=[\[(\\])")
_NUMBER_AFTER_FACTOR = re.compile(
    r"[)}][0-9]|\\(?!sqrt|log|ln|sin|cos|tan)[A-Za-z]+[0-9]|(?<![\\A-Za-z_^{])[A-Za-z][0-9]"
)
_BINDERS = re.compile(r"\\(?:sum|prod|int|lim)(?![A-Za-z])")
_MEASURE_IN_TEXT = re.compile(r"^\\text\{([-+]?[0-9.][^{}:]*)\}$")
_SAID = re.compile(r"^\\text\{[^{}]*(?:\bis|:|=)\s*\}\s*(?=.)")
_LETTERS = re.compile(r"\\[A-Za-z]+|([A-Za-z])")


class _Comparisons:
    """Cache symbolic comparisons; if another thread is comparing the same pair, wait for its result."""

    def __init__(self, most: int = 65536) -> None:
        self._most = most
        self._forget()
        os.register_at_fork(
            after_in_child=self._forget
        )  # after a fork the lock can be held, and the threads that compute results do not exist

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Future[bool]] = {}

    def of(self, answer: str, gold: str) -> bool:
        """Return the cached result, or compare in a worker process."""
        with self._lock:
            outcome = self._known.get((answer, gold))
            is_new = outcome is None
            if outcome is None:
                if len(self._known) >= self._most:
                    del self._known[next(iter(self._known))]
                outcome = self._known[answer, gold] = Future()
        if is_new:
            try:
                outcome.set_result(compare_symbolically(answer, gold))
            except BaseException as error:
                with self._lock:
                    self._known.pop((answer, gold), None)
                outcome.set_exception(error)
        return outcome.result()


_comparisons = _Comparisons()


def are_equal(answer: str, gold: str) -> bool:
    """Return whether two normalized answers are equal by the rule of their kind."""
    return _equal(answer, gold, 0)


def _equal(answer: str, gold: str, depth: int) -> bool:
    """Return whether two normalized answers are equal; `depth` is the depth of recursion."""
    if compact(answer) == compact(gold):
        return True
    if depth > _MAX_DEPTH:
        return False
    answer, gold = (_MEASURE_IN_TEXT.sub(r"\1", text) for text in (answer, gold))
    if _SAID.search(answer) and not _SAID.search(gold):
        return _equal(_SAID.sub("", answer), gold, depth + 1)
    number, gold_number = read_number(answer), read_number(gold)
    if number is not None and gold_number is not None and "," not in answer + gold:
        return number == gold_number
    if _ELLIPSIS in answer + gold:
        return _same_with_ellipsis(answer, gold, depth)
    if "\\approx" in answer:
        return any(_equal(side.strip(), gold, depth + 1) for side in answer.split("\\approx") if side.strip())
    base, gold_base = read_base_number(_without_name(answer)), read_base_number(_without_name(gold))
    if base is not None or gold_base is not None:
        return base == gold_base
    letter, gold_letter = single_letter(answer), single_letter(gold)
    if letter is not None and gold_letter is not None:
        return letter == gold_letter
    if is_words(gold) and "\\text{and}" not in gold and "," not in gold:
        return same_words(answer, gold) and (is_words(answer) or "\\text" in answer or not gold.isupper())
    for compare in (_same_region, _same_list, _same_matrix, _same_bracketed, _same_relation, _same_ratio):
        same = compare(answer, gold, depth)
        if same is not None:
            return same
    if is_words(answer):
        return False
    return _same_measure(answer, gold)


def _same_with_ellipsis(answer: str, gold: str, depth: int) -> bool:
    """Compare answers with an ellipsis part by part, in order, because the value of an ellipsis is
    unknown."""
    if read_number(answer) is not None or read_number(gold) is not None:  # 0.333...
        return _same_measure(answer, gold)
    parts, gold_parts = _parts_between_ellipses(answer), _parts_between_ellipses(gold)
    if answer.count(_ELLIPSIS) != gold.count(_ELLIPSIS) or len(parts) != len(gold_parts):
        return False
    pairs = zip(parts, gold_parts, strict=True)
    return all(
        compact(a) == compact(b)
        or (not _OPEN_END.search(a + " " + b) and bool(a) and _equal(a, b, depth + 1))
        for a, b in pairs
    )


def _parts_between_ellipses(text: str) -> list[str]:
    parts = []
    for stretch in text.split(_ELLIPSIS):
        parts += [part.strip(" ,;") for part in structures.split_items(stretch)] or [""]
    return parts


def _same_list(answer: str, gold: str, depth: int) -> bool | None:
    """Compare lists in any order, and assignments to several names by name; None if neither side is a
    list."""
    readings, gold_readings = structures.item_readings(answer), structures.item_readings(gold)
    if max(map(len, readings)) < 2 and max(map(len, gold_readings)) < 2:
        return None
    for items in readings:
        for gold_items in gold_readings:
            if len(items) == len(gold_items) == 1:
                number, gold_number = read_number(items[0]), read_number(gold_items[0])
                if number is not None and number == gold_number:
                    return True
                continue
            if _same_items(items, gold_items, depth):
                return True
    if min(map(len, readings)) > 1 or min(map(len, gold_readings)) > 1:
        return _same_set_and_list(answer, gold, depth)
    return _same_measure(answer, gold)


def _same_set_and_list(answer: str, gold: str, depth: int) -> bool:
    """Compare a list with a set: `1, 2` equals `\\{2, 1\\}`, and `x = 1, 2` equals `1, 2`."""
    stripped = [_without_name(text) for text in (answer, gold)]
    inner = []
    for text in stripped:
        brackets = structures.read_brackets(text)
        inner.append(brackets.inside if brackets is not None and brackets.opening == "\\{" else text)
    names = [text[: len(text) - len(rest)] for text, rest in zip((answer, gold), stripped, strict=True)]
    if inner == [answer, gold] or (all(names) and compact(names[0]) != compact(names[1])):
        return False
    return any(
        _same_items(items, gold_items, depth)
        for items in structures.item_readings(inner[0])
        for gold_items in structures.item_readings(inner[1])
    )


def _without_name(text: str) -> str:
    text = _MEMBER.sub("", text)
    relation = (
        structures.read_relation(structures.split_items(text)[0]) if structures.split_items(text) else None
    )
    if relation is not None and relation[1] == ["="] and structures.is_name(relation[0][0]):
        rest = text[text.index("=") + 1 :].strip()
        return text if "=" in rest else rest
    return text


def _same_items(items: list[str], gold_items: list[str], depth: int) -> bool:
    if len(items) != len(gold_items) or len(items) > _MAX_ITEMS:
        return False
    names, gold_names = _assigned_names(items), _assigned_names(gold_items)
    if gold_names is not None and len(set(gold_names)) == len(gold_names) > 1:
        if names is None:
            return all(_equal(a, b, depth + 1) for a, b in zip(items, gold_items, strict=True))
        if sorted(names) != sorted(gold_names):
            return False
    return _match_any_order(items, gold_items, lambda a, b: _equal(a, b, depth + 1))


def _assigned_names(items: list[str]) -> list[str] | None:
    names = []
    for item in items:
        relation = structures.read_relation(item)
        if relation is None or relation[1] != ["="] or not structures.is_name(relation[0][0]):
            return None
        names.append(compact(relation[0][0]))
    return names


def _match_any_order(items: list[str], gold_items: list[str], same: Callable[[str, str], bool]) -> bool:
    """Pair each item with a different equal gold item.

    Equality is transitive, so the first unpaired equal item can be taken.
    """
    free = list(gold_items)
    for item in items:
        match = next((candidate for candidate in free if same(item, candidate)), None)
        if match is None:
            return False
        free.remove(match)
    return True


def _same_region(answer: str, gold: str, depth: int) -> bool | None:
    """Compare subsets of the real line; None if the answers are not written as such sets."""
    marks = re.compile(
        r"\\cup|\\setminus|\\R(?![A-Za-z])|\\infty|[<>]|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|\\in(?![A-Za-z])"
    )
    if not marks.search(answer) and not marks.search(gold):
        return None
    region, gold_region = structures.read_real_set(answer), structures.read_real_set(gold)
    if region is None or gold_region is None:
        shorter, gold_shorter = _MEMBER.sub("", answer), _MEMBER.sub("", gold)
        return _equal(shorter, gold_shorter, depth + 1) if (shorter, gold_shorter) != (answer, gold) else None
    names = [_letter_of_region(text) for text in (answer, gold)]
    if None not in names and names[0] != names[1]:
        return False
    return structures.same_real_set(region, gold_region, lambda a, b: _equal(a, b, depth + 1))


def _letter_of_region(text: str) -> str | None:
    relation = structures.read_relation(text)
    if relation is None:
        return None
    return next((side for side in relation[0] if structures.is_name(side)), None)


def _same_bracketed(answer: str, gold: str, depth: int) -> bool | None:
    brackets, gold_brackets = (
        structures.read_brackets(_without_name(answer)),
        structures.read_brackets(_without_name(gold)),
    )
    if brackets is None and gold_brackets is None:
        return None
    if _is_grouping(brackets) and _is_grouping(gold_brackets):
        inner, gold_inner = _without_round(answer, brackets), _without_round(gold, gold_brackets)
        return (
            _equal(inner, gold_inner, depth + 1)
            if (inner, gold_inner) != (answer, gold) and inner and gold_inner
            else None
        )
    if brackets is None or gold_brackets is None:
        either = brackets or gold_brackets
        if either is not None and either.opening == "\\{":
            other = gold if gold_brackets is None else answer
            is_single = len(structures.expand_signs(structures.split_items(either.inside))) == 1
            return is_single and _equal(other, either.inside, depth + 1)
        same = _same_vector(answer, gold, depth)
        return (
            False
            if same is None and "\\begin" not in answer + gold and "\\cup" not in answer + gold
            else same
        )
    if (brackets.opening, brackets.closing) != (gold_brackets.opening, gold_brackets.closing):
        return False
    for items in structures.item_readings(brackets.inside):
        for gold_items in structures.item_readings(gold_brackets.inside):
            if brackets.opening == "\\{":
                if _same_members(items, gold_items, depth):
                    return True
            elif len(items) == len(gold_items) and all(
                _equal(a, b, depth + 1) for a, b in zip(items, gold_items, strict=True)
            ):
                return True
    return False


def _is_grouping(brackets: structures.Brackets | None) -> bool:
    """Return whether there are no brackets, or round or square brackets around one expression."""
    return brackets is None or (brackets.opening in "([" and len(structures.split_items(brackets.inside)) < 2)


def _without_round(text: str, brackets: structures.Brackets | None) -> str:
    return brackets.inside if brackets is not None and brackets.opening == "(" else text


def _same_members(items: list[str], gold_items: list[str], depth: int) -> bool:
    """Compare sets; repeated members count once."""
    if max(len(items), len(gold_items)) > _MAX_ITEMS:
        return False
    return all(any(_equal(a, b, depth + 1) for b in gold_items) for a in items) and all(
        any(_equal(a, b, depth + 1) for a in items) for b in gold_items
    )


def _same_vector(answer: str, gold: str, depth: int) -> bool | None:
    """Compare a column vector with a tuple: `(1, 2)` equals the matrix with the rows 1 and 2."""
    texts = []
    for text in (_without_name(answer), _without_name(gold)):
        matrix = structures.read_matrix(text)
        brackets = structures.read_brackets(text)
        if matrix is not None and matrix[0] == "matrix" and all(len(row) == 1 for row in matrix[1]):
            texts.append([row[0] for row in matrix[1]])
        elif brackets is not None and matrix is None and brackets.opening == "(" and brackets.closing == ")":
            texts.append(structures.item_readings(brackets.inside)[-1])
        else:
            return None
    return len(texts[0]) == len(texts[1]) and all(
        _equal(a, b, depth + 1) for a, b in zip(*texts, strict=True)
    )


def _same_matrix(answer: str, gold: str, depth: int) -> bool | None:
    matrix, gold_matrix = (
        structures.read_matrix(_without_name(answer)),
        structures.read_matrix(_without_name(gold)),
    )
    if matrix is None or gold_matrix is None:
        return None if "\\begin" in answer or "\\begin" in gold or matrix is gold_matrix else False
    (kind, rows), (gold_kind, gold_rows) = matrix, gold_matrix
    if kind != gold_kind or [len(row) for row in rows] != [len(row) for row in gold_rows]:
        return False if kind == gold_kind else None
    return all(
        _equal(a, b, depth + 1)
        for row, gold_row in zip(rows, gold_rows, strict=True)
        for a, b in zip(row, gold_row, strict=True)
    )


def _same_relation(answer: str, gold: str, depth: int) -> bool | None:
    """Compare equations and inequalities; `x = 5` equals the value `5`."""
    relation, gold_relation = structures.read_relation(answer), structures.read_relation(gold)
    if relation is None and gold_relation is None:
        return None
    value, gold_value = _assigned_value(relation), _assigned_value(gold_relation)
    if relation is None:
        return gold_value is not None and _equal(answer, gold_value[1], depth + 1)
    if gold_relation is None:
        return value is not None and _equal(value[1], gold, depth + 1)
    (sides, signs), (gold_sides, gold_signs) = relation, gold_relation
    if value is not None and gold_value is not None and _base_letter(value[0]) == _base_letter(gold_value[0]):
        return _equal(value[1], gold_value[1], depth + 1)
    if gold_value is not None and is_constant(gold_value[1]) and gold_signs == ["="]:
        swapped = signs == ["="] and compact(sides[1]) == compact(gold_value[0])
        return swapped and _equal(sides[0], gold_value[1], depth + 1)
    if len(sides) != 2 or len(gold_sides) != 2:
        return _equal_sides(sides, signs, gold_sides, gold_signs, depth)
    return _same_two_sided(sides, signs[0], gold_sides, gold_signs[0], depth)


def _same_two_sided(sides: list[str], sign: str, gold_sides: list[str], gold_sign: str, depth: int) -> bool:
    flipped = {">": "<", "\\ge": "\\le"}
    if sign in flipped:
        sides, sign = sides[::-1], flipped[sign]
    if gold_sign in flipped:
        gold_sides, gold_sign = gold_sides[::-1], flipped[gold_sign]
    if sign != gold_sign:
        return False
    texts = [structures.tokens(side) for side in (*sides, *gold_sides)]
    if any(is_words(side) for side in (*sides, *gold_sides)) or not texts:
        orders = [sides, sides[::-1]] if sign in ("=", "\\ne") else [sides]
        return any(
            all(_equal(a, b, depth + 1) for a, b in zip(order, gold_sides, strict=True)) for order in orders
        )
    same = proportional((sides[0], sides[1]), (gold_sides[0], gold_sides[1]), positive=sign in ("<", "\\le"))
    if same is None:
        return _guarded(sign.join(sides), gold_sign.join(gold_sides))
    return same


def _equal_sides(
    sides: list[str], signs: list[str], gold_sides: list[str], gold_signs: list[str], depth: int
) -> bool:
    flipped = {">": "<", "\\ge": "\\le"}
    if all(sign in flipped for sign in signs):
        sides, signs = sides[::-1], [flipped[sign] for sign in reversed(signs)]
    if all(sign in flipped for sign in gold_signs):
        gold_sides, gold_signs = gold_sides[::-1], [flipped[sign] for sign in reversed(gold_signs)]
    return signs == gold_signs and all(
        _equal(a, b, depth + 1) for a, b in zip(sides, gold_sides, strict=True)
    )


def _assigned_value(relation: tuple[list[str], list[str]] | None) -> tuple[str, str] | None:
    """Return name and value of `x = 5` or `f(x) = 2x`, with the last value of a chain `x = 10/2 = 5`; else
    None."""
    if relation is None or set(relation[1]) != {"="} or not structures.is_name(relation[0][0]):
        return None
    name, value = relation[0][0], relation[0][-1]
    return None if value.isalpha() and value.isupper() and len(value) > 1 else (name, value)


def _base_letter(name: str) -> str:
    return compact(re.sub(r"_ ?(?:\{.*\}|\S)$", "", name))


def _same_ratio(answer: str, gold: str, depth: int) -> bool | None:
    """Compare `3:4` part by part; a ratio of two parts also equals the quotient. None if neither is a
    ratio."""
    if ":" not in answer + gold or "\\text" in answer + gold:
        return None
    parts, gold_parts = ([part.strip() for part in text.split(":")] for text in (answer, gold))
    if len(parts) == len(gold_parts):
        return all(_equal(a, b, depth + 1) for a, b in zip(parts, gold_parts, strict=True))
    quotient, gold_quotient = (
        f"\\frac{{{p[0]}}}{{{p[1]}}}" if len(p) == 2 else p[0] for p in (parts, gold_parts)
    )
    return (
        max(len(parts), len(gold_parts)) == 2
        and all([*parts, *gold_parts])
        and _equal(quotient, gold_quotient, depth + 1)
    )


def _same_measure(answer: str, gold: str) -> bool:
    """Compare expressions including their units and percent signs."""
    if _INFINITE.fullmatch(answer) or _INFINITE.fullmatch(gold):
        return compact(answer).lstrip("+") == compact(gold).lstrip("+")
    measure, gold_measure = split_measure(answer), split_measure(gold)
    scale = same_unit(measure.unit, gold_measure.unit)
    if scale is None:
        return False
    scales = [scale]
    if measure.percent != gold_measure.percent:
        scales.append(Fraction(1, 100) if measure.percent else Fraction(100))
    undecided = False
    for factor in scales:
        same = same_expression(measure.core, gold_measure.core, factor)
        if same:
            return True
        undecided |= same is None
    if not undecided or scale != 1:
        return False
    if (measure.core, gold_measure.core) != (answer, gold):
        return compact(measure.core) == compact(gold_measure.core) or _equal(
            measure.core, gold_measure.core, _MAX_DEPTH
        )
    return _guarded(answer, gold)


def _guarded(answer: str, gold: str) -> bool:
    """Compare by math-verify if both sides have the same letters and neither is words; else return False.

    Without this check math-verify ignores the case of letters and reads words as products.
    """
    letters, gold_letters = (
        {letter for letter in _LETTERS.findall(text) if letter} for text in (answer, gold)
    )
    bound = _BINDERS.search(answer + gold)  # the index letter of a sum may differ between the sides
    if (
        (letters != gold_letters and not bound)
        or _NUMBER_AFTER_FACTOR.search(answer)
        or is_words(answer)
        or is_words(gold)
    ):
        return False
    return _comparisons.of(answer, gold)
