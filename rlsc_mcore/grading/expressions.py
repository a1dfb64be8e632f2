"""Compare two expressions by their values at fixed points.

Supported are numbers, letters with indices, sums, products, fractions, powers, roots, factorials and
elementary functions; math-verify compares other expressions. The values of a text are cached. Irrational
arithmetic uses 60 digits.
"""

import threading
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from rlsc_mcore.grading.evaluator import POINTS, POSITIVE_POINTS, STEP_POINTS, Evaluator, Value, is_real
from rlsc_mcore.grading.numbers import read_number
from rlsc_mcore.grading.parser import Tree, UnsupportedError, parse, unsupported

_DIGITS = 60
_EQUAL, _DIFFERENT = 1e-40, 1e-25  # relative differences; between them the comparison is undecided


@dataclass(frozen=True)
class Result:
    """A value, and whether a root, power or logarithm in it has several branches."""

    value: Value
    on_branch: bool


def same_expression(answer: str, gold: str, scale: Fraction = Fraction(1)) -> bool | None:
    """Return whether answer * scale equals gold for two normalized texts; None if this is undecided."""
    if any(read_number(side) is None and not is_expression(side) for side in (answer, gold)):
        return None
    constant = is_constant(answer) and is_constant(gold)
    has_steps = any(command in answer + gold for command in ("\\lfloor", "\\lceil"))
    decided = 0
    for point in (*range(POINTS), *(STEP_POINTS if has_steps else ())):
        first, second = value_at(answer, point), value_at(gold, point)
        if first is None or second is None:
            continue
        same = _same_value(first.value * _as(scale, first.value), second.value)
        if same is None:
            return None
        if constant:
            return same
        if not same:
            if first.on_branch or second.on_branch:
                continue
            if (
                point == POSITIVE_POINTS
            ):  # letters are negative here, so sqrt(x^2) and x differ; leave it to math-verify
                return None
            return False
        decided += 1
    return True if decided >= 2 else None


def proportional(answer: tuple[str, str], gold: tuple[str, str], *, positive: bool = False) -> bool | None:
    """Return whether a - b of the first pair is a constant multiple of that of the second; None if undecided.

    With `positive` the multiple must be positive, as for equal inequalities.
    """
    if not all(is_expression(side) for side in (*answer, *gold)):
        return None
    ratios = []
    for point in range(POINTS):
        results = [value_at(side, point) for side in (*answer, *gold)]
        if any(result is None for result in results):
            continue
        values = [result.value for result in results if result is not None]
        first = _difference(values[0], values[1])
        second = _difference(values[2], values[3])
        if first is None or second is None or second == 0 or first == 0:
            return None if first == second else False
        ratios.append(_divide(first, second))
    if len(ratios) < 3:
        return None
    same = [_same_value(ratio, ratios[0]) for ratio in ratios[1:]]
    if positive and all(same):
        return is_real(ratios[0]) and ratios[0] > 0
    return None if None in same else all(same)


def number_value(text: str) -> float | None:
    """Return the real value of a normalized expression without letters, or None if it has none."""
    number = read_number(text)
    if number is not None:
        return float(number)
    if not is_expression(text) or not is_constant(text):
        return None
    result = value_at(text, 0)
    return float(result.value.real) if result is not None and is_real(result.value) else None


def is_expression(text: str) -> bool:
    """Return whether `parse` can read the text."""
    return parse(text) is not None


def is_constant(text: str) -> bool:
    """Return whether the text has no variables; True also for a text that cannot be parsed."""
    parsed = parse(text)
    return parsed is None or not parsed[1]


@lru_cache(maxsize=16384)
def value_at(text: str, point: int) -> Result | None:
    """Return the value of a text at a point; None if it is undefined there or the text is no expression."""
    number = read_number(text)
    if number is not None:
        return Result(number, False)
    parsed = parse(text)
    if parsed is None:
        return None
    if point and not parsed[1]:
        return value_at(text, 0)
    try:
        return _settle(parsed[0], point)
    except (UnsupportedError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None


def _settle(tree: Tree, point: int) -> Result:
    """Evaluate a tree at a point; a value near zero is evaluated again with three times the digits."""
    context = _context(_DIGITS)
    evaluator = Evaluator(context, point)
    value = evaluator.value(tree)
    if isinstance(value, Fraction):
        return Result(value, evaluator.on_branch)
    if abs(value) < 1e-25:
        again = Evaluator(_context(3 * _DIGITS), point).value(tree)
        if abs(again) < abs(value) * 1e-60 or abs(again) < 1e-140:
            return Result(Fraction(0), evaluator.on_branch)
        value = again
    return Result(value, evaluator.on_branch) if context.isfinite(value) else unsupported("not finite")


_local = (
    threading.local()
)  # an mpmath context changes its precision during a computation, so each thread has its own


def _context(digits: int) -> Any:
    name = f"context_{digits}"
    if not hasattr(_local, name):
        context = mpmath.MPContext()
        context.dps = digits
        setattr(_local, name, context)
    return getattr(_local, name)


def _as(scale: Fraction, value: Value) -> Value:
    return (
        scale if isinstance(value, Fraction) else _context(_DIGITS).mpf(scale.numerator) / scale.denominator
    )


def _inexact(value: Value) -> Value:
    return (
        _context(_DIGITS).mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value
    )


def _difference(first: Value, second: Value) -> Value | None:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first - second
    first, second = _inexact(first), _inexact(second)
    difference = first - second
    size = max(abs(first), abs(second))
    if size == 0 or abs(difference) < _EQUAL * size:
        return Fraction(0)
    return difference if abs(difference) > _DIFFERENT * size else None


def _divide(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first / second
    return _inexact(first) / _inexact(second)


def _same_value(first: Value, second: Value) -> bool | None:
    difference = _difference(first, second)
    return None if difference is None else difference == 0
