"""Evaluate the tree of an expression at one point; rational arithmetic is exact.

The value of a letter is a rational number that depends only on its name and the point. Other arithmetic uses
the precision of the evaluator's mpmath context.
"""

import hashlib
import math
from fractions import Fraction
from typing import Any

from rlsc_mcore.grading.parser import Tree, unsupported

Value = Any  # a Fraction, or a real or complex mpmath number

POSITIVE_POINTS = 3
POINTS = POSITIVE_POINTS + 1  # at the last point letters are negative
STEP_POINTS = range(POINTS, POINTS + 24)  # letters are integers; many points, as floors differ at few of them
_MAX_BITS, _MAX_FACTORIAL, _MAX_EXPONENT = 100_000, 3000, 10**6


def is_real(value: Value) -> bool:
    """Return whether a value is real."""
    return isinstance(value, Fraction) or value.imag == 0


class Evaluator:
    """Evaluate trees at one point, with Fractions as long as the values are exact and small."""

    def __init__(self, context: Any, point: int) -> None:
        self.context = context
        self.point = point
        self.on_branch = False

    def value(self, tree: Tree) -> Value:
        result = getattr(self, "of_" + tree[0], self.of_function)(
            *tree[1:] if hasattr(self, "of_" + tree[0]) else tree
        )
        if (
            isinstance(result, Fraction)
            and result.numerator.bit_length() + result.denominator.bit_length() > _MAX_BITS
        ):
            return self.inexact(result)
        return result

    def inexact(self, value: Value) -> Value:
        return self.context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def of_number(self, number: Fraction) -> Value:
        return number

    def of_pi(self) -> Value:
        return +self.context.pi

    def of_e(self) -> Value:
        return +self.context.e

    def of_i(self) -> Value:
        return self.context.mpc(0, 1)

    def of_name(self, name: str) -> Value:
        digest = hashlib.sha256(f"{name}/{self.point}".encode()).digest()
        if self.point in STEP_POINTS:
            return Fraction(1 + int.from_bytes(digest[:4], "big") % (3 * 2 ** (self.point - POINTS)))
        size = Fraction(
            101 + int.from_bytes(digest[:2], "big") % 900, 211 + 2 * (int.from_bytes(digest[2:4], "big") % 60)
        )
        return -size if self.point == POSITIVE_POINTS else size

    def of_opaque(self, name: str, argument: Tree) -> Value:
        value = self.inexact(self.value(argument))
        shown = self.context.nstr(value, 20)
        return self.of_name(f"{name}({shown})")

    def of_sum(self, terms: tuple[tuple[int, Any], ...]) -> Value:
        values = [self.value(term) if sign > 0 else -self.value(term) for sign, term in terms]
        if all(isinstance(value, Fraction) for value in values):
            return sum(values, Fraction(0))
        inexact = [self.inexact(value) for value in values]
        total = sum(inexact, self.context.mpf(0))
        size = max(map(abs, inexact))
        # If the terms cancel, only rounding errors remain: treat the sum as zero.
        return Fraction(0) if abs(total) < size * self.context.mpf(10) ** (6 - self.context.dps) else total

    def of_product(self, factors: tuple[tuple[int, Any], ...]) -> Value:
        result: Value = Fraction(1)
        for power, factor in factors:
            value = self.value(factor)
            if power < 0 and value == 0:
                raise ZeroDivisionError
            if not (isinstance(value, Fraction) and isinstance(result, Fraction)):
                value, result = self.inexact(value), self.inexact(result)
            result = result * value if power > 0 else result / value
        return result

    def of_power(self, base_tree: Tree, exponent_tree: Tree) -> Value:
        base, exponent = self.value(base_tree), self.value(exponent_tree)
        if abs(exponent) > _MAX_EXPONENT:
            unsupported("large exponent")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent)
            if base == 0 and exponent <= 0:
                raise ZeroDivisionError
            if bits <= _MAX_BITS:
                return Fraction(base ** int(exponent))
        if (
            isinstance(base, Fraction)
            and isinstance(exponent, Fraction)
            and base >= 0
            and exponent.denominator <= 6
        ):
            root = _exact_root(base, exponent.denominator)
            if root is not None and abs(exponent.numerator) <= 64 and root != 0:
                return Fraction(root**exponent.numerator)
        integral = isinstance(exponent, Fraction) and exponent.denominator == 1
        if base_tree != ("e",) and not integral:
            self.note_branch(base)
        return self.context.power(self.inexact(base), self.inexact(exponent))

    def note_branch(self, value: Value) -> None:
        self.on_branch |= not (is_real(value) and value.real >= 0)

    def of_root(self, radicand_tree: Tree, degree_tree: Tree) -> Value:
        radicand, degree = self.value(radicand_tree), self.value(degree_tree)
        if isinstance(degree, Fraction) and degree.denominator == 1 and 1 <= degree <= 100:
            number = int(degree)
            if isinstance(radicand, Fraction) and radicand >= 0:
                root = _exact_root(radicand, number)
                if root is not None:
                    return root
            inexact = self.inexact(radicand)
            if number % 2 and is_real(inexact) and inexact.real < 0:
                return -self.context.root(-inexact.real, number)
            self.note_branch(inexact)
            return self.context.sqrt(inexact) if number == 2 else self.context.root(inexact, number)
        self.note_branch(radicand)
        return self.context.power(self.inexact(radicand), 1 / self.inexact(degree))

    def of_factorial(self, tree: Tree) -> Value:
        value = self.value(tree)
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            if value > _MAX_FACTORIAL:
                unsupported("large factorial")
            return Fraction(math.factorial(int(value)))
        return self.context.factorial(self.inexact(value))

    def of_binomial(self, top_tree: Tree, bottom_tree: Tree) -> Value:
        top, bottom = self.value(top_tree), self.value(bottom_tree)
        if abs(top) > _MAX_FACTORIAL or abs(bottom) > _MAX_FACTORIAL:
            unsupported("large binomial")
        value = self.context.binomial(self.inexact(top), self.inexact(bottom))
        if (
            all(isinstance(part, Fraction) and part.denominator == 1 for part in (top, bottom))
            and abs(value) < 1e40
        ):
            return Fraction(int(self.context.nint(value)))
        return value

    def of_absolute(self, tree: Tree) -> Value:
        return abs(self.value(tree))

    def of_floor(self, tree: Tree) -> Value:
        return self.rounded(self.value(tree), self.context.floor)

    def of_ceil(self, tree: Tree) -> Value:
        return self.rounded(self.value(tree), self.context.ceil)

    def rounded(self, value: Value, rule: Any) -> Value:
        if not is_real(value) or abs(value) > 10**30:
            unsupported("rounding")
        return Fraction(int(rule(self.inexact(value))))

    def of_function(self, name: str, argument: Tree) -> Value:
        value = self.inexact(self.value(argument))
        if abs(value) > _MAX_EXPONENT and name in ("exp", "sinh", "cosh", "tanh"):
            unsupported("large exponent")
        if abs(value) > 1e30 and name not in ("ln", "log10", "atan"):
            unsupported("large argument")
        if name == "ln" and value == 0:
            raise ZeroDivisionError
        if name in ("ln", "log10"):
            self.note_branch(value)
        if name in ("asin", "acos"):
            self.on_branch |= not (is_real(value) and abs(value) <= 1)
        return getattr(self.context, name)(value)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    if value.numerator.bit_length() + value.denominator.bit_length() > 4000:
        return None
    parts = []
    for part in (value.numerator, value.denominator):
        root = _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _integer_root(value: int, degree: int) -> int:
    """Return the largest integer whose `degree`-th power is at most `value` (integer Newton's method)."""
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // degree)
    while True:
        better = ((degree - 1) * guess + value // guess ** (degree - 1)) // degree
        if better >= guess:
            return guess
        guess = better
