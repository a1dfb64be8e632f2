"""Decide whether two expressions are equal by their values at fixed points, exactly where all arithmetic is rational.

Reads the LaTeX that final answers are made of: numbers, letters with indices, sums, products, fractions, powers, roots,
factorials, elementary functions. What it does not know is left to math-verify. Each letter has a rational value that depends
on its name and on the point alone, so that a text is evaluated once for all its comparisons. Irrational arithmetic has 60 digits.
"""

import hashlib
import math
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from rlsc_mcore.grading.numbers import read_number

Value = Any  # Fraction, or a real or complex number of the thread's mpmath context

POSITIVE_POINTS = 3
POINTS = POSITIVE_POINTS + 1  # at the last one letters are negative
STEP_POINTS = range(POINTS, POINTS + 24)  # letters are integers: floors differ at few points
_DIGITS = 60
_EQUAL, _DIFFERENT = 1e-40, 1e-25  # relative differences; between them nothing is decided
_MAX_DEPTH, _MAX_BITS, _MAX_FACTORIAL, _MAX_EXPONENT = 40, 100_000, 3000, 10**6

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+)|(?P<other>\S))"
)
_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "hbar",
        "ell",
        "nabla",
        "partial",
        "odot",
        "R",
        "Re",
        "Im",
    ]
)
_DECORATIONS = frozenset(
    ["vec", "hat", "bar", "tilde", "dot", "ddot", "overline", "widehat", "overrightarrow", "mathcal", "mathscr", "mathfrak"]
)
_FUNCTIONS = {
    **{name: name for name in ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "ln"]},
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "log": "ln",
    "lg": "log10",
}
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
_OPAQUE_FUNCTIONS = frozenset("fg")
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_DIFFERENTIAL = re.compile(r"(?:d|\\partial)(?:\^\{?[0-9]\}?)?(?![0-9^_'])(?:\\?[A-Za-z].*)?")


@dataclass(frozen=True)
class Result:
    """A value, and whether a root, power or logarithm had several values to choose from."""

    value: Value
    on_branch: bool


class UnsupportedError(Exception):
    """The text is no expression that this module evaluates."""


def same_expression(answer: str, gold: str, scale: Fraction = Fraction(1)) -> bool | None:
    """Say whether answer * scale equals gold; None where that cannot be decided here. Both texts are normalized."""
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
            if point == POSITIVE_POINTS:  # sqrt(x^2) and x differ here; math-verify knows which letters are real
                return None
            if first.on_branch or second.on_branch:
                continue
            return False
        decided += 1
    return True if decided >= 2 else None


def proportional(answer: tuple[str, str], gold: tuple[str, str], *, positive: bool = False) -> bool | None:
    """Say whether (a - b) of the first pair is a constant multiple of that of the second; None where that cannot be decided.

    `positive` asks for a positive multiple, as equal inequalities have.
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
        return _is_real(ratios[0]) and ratios[0] > 0
    return None if None in same else all(same)


def number_value(text: str) -> float | None:
    """Return the real value of a normalized expression without letters; None where it has none."""
    number = read_number(text)
    if number is not None:
        return float(number)
    if not is_expression(text) or not is_constant(text):
        return None
    result = value_at(text, 0)
    return float(result.value.real) if result is not None and _is_real(result.value) else None


def is_expression(text: str) -> bool:
    """Say whether the text can be parsed here."""
    return _parsed(text) is not None


def is_constant(text: str) -> bool:
    """Say whether the text has no letters that stand for unknown values."""
    parsed = _parsed(text)
    return parsed is None or not parsed[1]


@lru_cache(maxsize=16384)
def value_at(text: str, point: int) -> Result | None:
    """Return the value of a text at a point; None where it has none there or is no expression."""
    number = read_number(text)
    if number is not None:
        return Result(number, False)
    parsed = _parsed(text)
    if parsed is None:
        return None
    if point and not parsed[1]:
        return value_at(text, 0)
    try:
        return _settle(parsed[0], point)
    except (UnsupportedError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None


def _settle(tree: tuple[Any, ...], point: int) -> Result:
    """Evaluate; a value that is nearly zero is evaluated with more digits to see whether it is zero."""
    context = _context(_DIGITS)
    evaluator = _Evaluator(context, point)
    value = evaluator.value(tree)
    if isinstance(value, Fraction):
        return Result(value, evaluator.on_branch)
    if abs(value) < 1e-25:
        again = _Evaluator(_context(3 * _DIGITS), point).value(tree)
        if abs(again) < abs(value) * 1e-60 or abs(again) < 1e-140:
            return Result(Fraction(0), evaluator.on_branch)
        value = again
    return Result(value, evaluator.on_branch) if context.isfinite(value) else _unsupported("not finite")


_local = threading.local()  # a context of mpmath changes its precision while it computes, so each thread has its own


def _context(digits: int) -> Any:
    name = f"context_{digits}"
    if not hasattr(_local, name):
        context = mpmath.MPContext()
        context.dps = digits
        setattr(_local, name, context)
    return getattr(_local, name)


def _as(scale: Fraction, value: Value) -> Value:
    return scale if isinstance(value, Fraction) else _context(_DIGITS).mpf(scale.numerator) / scale.denominator


def _inexact(value: Value) -> Value:
    return _context(_DIGITS).mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


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


def _is_real(value: Value) -> bool:
    return isinstance(value, Fraction) or value.imag == 0


def _unsupported(reason: str) -> Any:
    raise UnsupportedError(reason)


@lru_cache(maxsize=16384)
def _parsed(text: str) -> tuple[tuple[Any, ...], frozenset[str]] | None:
    try:
        parser = _Parser(text)
        return parser.whole(), frozenset(parser.names)
    except (UnsupportedError, RecursionError, ValueError):
        return None


class _Parser:
    """Recursive descent; a tree is a tuple whose first item names the node."""

    def __init__(self, text: str) -> None:
        if len(text) > 1000:
            _unsupported("too long")
        self.tokens = [match.group().strip() for match in _TOKEN.finditer(text)]
        self.starts = [match.start() for match in _TOKEN.finditer(text)]
        self.text = text
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.names: set[str] = set()

    def whole(self) -> tuple[Any, ...]:
        tree = self.sum()
        return tree if self.position == len(self.tokens) else _unsupported("trailing text")

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.next
        if not token or (expected and token not in expected):
            _unsupported(f"expected {expected}")
        self.position += 1
        return token

    def sum(self) -> tuple[Any, ...]:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            _unsupported("too deep")
        terms = []
        sign = 1
        while self.next in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        terms.append((sign, self.product()))
        while self.next in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            while self.next in ("+", "-"):
                sign *= -1 if self.take() == "-" else 1
            terms.append((sign, self.product()))
        self.depth -= 1
        return ("sum", tuple(terms)) if len(terms) > 1 or terms[0][0] < 0 else terms[0][1]

    def product(self) -> tuple[Any, ...]:
        factors = [(1, self.power())]
        while True:
            token = self.next
            if token in ("*", "\\cdot", "\\times", "/", "\\div"):
                self.take()
                sign = 1
                while self.next in ("+", "-"):
                    sign *= -1 if self.take() == "-" else 1
                factor = self.power()
                factors.append((-1 if token in ("/", "\\div") else 1, factor if sign > 0 else ("sum", ((-1, factor),))))
            elif self.begins_factor():
                self.check_juxtaposed_numbers()
                factors.append((1, self.power()))
            else:
                break
        return ("product", tuple(factors)) if len(factors) > 1 else factors[0][1]

    def check_juxtaposed_numbers(self) -> None:
        """Refuse `18 18`, `x2` and `\\frac{1}{2}3`: neither clearly a product nor one number."""
        before = self.tokens[self.position - 1]
        touching = self.position < len(self.starts) and not self.text[self.starts[self.position]].isspace()
        if self.next[0].isdigit() and (before[-1].isdigit() or touching):
            _unsupported("a number after a factor")

    def begins_factor(self) -> bool:
        token = self.next
        if not token or (token == "|" and self.bars):
            return False
        if token.startswith("\\"):
            name = token[1:]
            return name in _GREEK or name in _FUNCTIONS or name in _DECORATIONS or name in (
                "pi", "frac", "sqrt", "binom", "lfloor", "lceil", "text", "dbinom", "tbinom",
            )  # fmt: skip
        return token[0].isalnum() or (token[0] == "." and len(token) > 1) or token in ("(", "[", "{", "|")

    def power(self) -> tuple[Any, ...]:
        base = self.atom()
        while self.next in ("!", "^"):
            if self.take() == "!":
                base = ("factorial", base)
                if self.next == "!":
                    _unsupported("double factorial")
            else:
                base = ("power", base, self.argument())
        return base

    def argument(self) -> tuple[Any, ...]:
        """Read what a command or `^` applies to: a group, or one token."""
        token = self.next
        if token == "{":
            return self.group()
        if token in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            return ("sum", ((sign, self.atom()),))
        if token and token[0].isdigit():
            return ("number", self.number(self.take()))
        return self.atom()

    def group(self) -> tuple[Any, ...]:
        opening = self.take()
        closing = _CLOSING[opening]
        bars, self.bars = self.bars, opening == "|"
        tree = self.sum()
        self.take(closing)
        self.bars = bars
        return tree

    def number(self, token: str) -> Fraction:
        return Fraction(token.replace(",", ""))

    def atom(self) -> tuple[Any, ...]:
        token = self.next
        if not token:
            _unsupported("nothing where a value is expected")
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return self.read_mixed(self.number(self.take()), token)
        if token in ("(", "[", "{"):
            return self.group()
        if token == "|":
            return ("absolute", self.group())
        if token in ("\\lfloor", "\\lceil"):
            return (token[2:], self.group())
        if token.startswith("\\"):
            return self.command(self.take()[1:])
        if token.isalpha():
            return self.letter(self.take())
        return _unsupported(f"unknown token {token}")

    def read_mixed(self, whole: Fraction, token: str) -> tuple[Any, ...]:
        following = self.tokens[self.position : self.position + 7]
        if token.isdigit() and len(following) == 7 and following[0] == "\\frac" and following[1] == following[4] == "{":
            top, bottom = following[2], following[5]
            if top.isdigit() and bottom.isdigit() and int(top) < int(bottom) and following[3] == following[6] == "}":
                self.position += 7
                return ("number", whole + Fraction(int(top), int(bottom)))
        return ("number", whole)

    def command(self, name: str) -> tuple[Any, ...]:
        if name == "frac":
            return self.fraction()
        if name == "sqrt":
            degree: tuple[Any, ...] = ("number", Fraction(2))
            if self.next == "[":
                degree = self.group()
            return ("root", self.group() if self.next == "(" else self.argument(), degree)
        if name in ("binom", "dbinom", "tbinom"):
            return ("binomial", self.argument(), self.argument())
        if name == "pi":
            return self.name("\\pi") if self.next == "_" else ("pi",)
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _DECORATIONS:
            return self.name(f"\\{name}{{{self.raw_argument()}}}")
        if name == "text":
            text = self.raw_argument()
            return self.letter(text) if len(text) == 1 and text.isalpha() else _unsupported("text")
        return self.name("\\" + name) if name in _GREEK else _unsupported(f"unknown command {name}")

    def fraction(self) -> tuple[Any, ...]:
        start = self.position
        top_text, bottom_text = self.raw_argument(), self.raw_argument()
        if _DIFFERENTIAL.fullmatch(top_text) and _DIFFERENTIAL.fullmatch(bottom_text):
            return self.name(f"derivative {top_text} by {bottom_text}")
        self.position = start
        return ("product", ((1, self.argument()), (-1, self.argument())))

    def function(self, name: str) -> tuple[Any, ...]:
        base, power = None, None
        if self.next == "_":
            self.take()
            base = self.argument()
        if self.next == "^":
            self.take()
            power = self.argument()
        argument = self.function_argument()
        if name == "log" and base is not None:
            tree: tuple[Any, ...] = ("product", ((1, ("ln", argument)), (-1, ("ln", base))))
        elif base is not None:
            return _unsupported("index of a function")
        elif power == ("sum", ((-1, ("number", Fraction(1))),)):
            return (_INVERSES[name], argument) if name in _INVERSES else _unsupported("inverse")
        else:
            tree = (_FUNCTIONS[name], argument)
        return tree if power is None else ("power", tree, power)

    def function_argument(self) -> tuple[Any, ...]:
        if self.next in ("(", "[", "{"):
            return self.group()
        factors = [(1, self.power())]
        while self.begins_factor() and self.next[1:] not in _FUNCTIONS and self.next not in ("(", "["):
            self.check_juxtaposed_numbers()
            factors.append((1, self.power()))
        return ("product", tuple(factors)) if len(factors) > 1 else factors[0][1]

    def letter(self, letter: str) -> tuple[Any, ...]:
        if letter in ("e", "i") and self.next not in ("_", "'"):
            return (letter,)
        at_zero = self.tokens[self.position : self.position + 3] == ["(", "0", ")"]
        if self.next == "(" and (letter in _OPAQUE_FUNCTIONS or at_zero):
            self.names.add(letter)
            return ("opaque", letter, self.group())
        return self.name(letter)

    def name(self, name: str) -> tuple[Any, ...]:
        while self.next in ("_", "'"):
            if self.take() == "'":
                name += "'"
            else:
                name += "_" + self.raw_argument()
        self.names.add(name)
        return ("name", name)

    def raw_argument(self) -> str:
        """Return a group's or one token's text without white space and text commands."""
        if self.next != "{":
            token = self.take()
            return token if token != "\\text" else self.raw_argument()
        start, depth = self.position, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth == 0:
                break
        tokens = self.tokens[start + 1 : self.position - 1]
        return "".join(token for token in tokens if token not in ("\\text", "{", "}"))


class _Evaluator:
    """Computes a tree at one point, in Fractions as long as they are exact and small."""

    def __init__(self, context: Any, point: int) -> None:
        self.context = context
        self.point = point
        self.on_branch = False

    def value(self, tree: tuple[Any, ...]) -> Value:
        result = getattr(self, "of_" + tree[0], self.of_function)(*tree[1:] if hasattr(self, "of_" + tree[0]) else tree)
        if isinstance(result, Fraction) and result.numerator.bit_length() + result.denominator.bit_length() > _MAX_BITS:
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
        size = Fraction(101 + int.from_bytes(digest[:2], "big") % 900, 211 + 2 * (int.from_bytes(digest[2:4], "big") % 60))
        return -size if self.point == POSITIVE_POINTS else size

    def of_opaque(self, name: str, argument: tuple[Any, ...]) -> Value:
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
        # Terms that cancel leave rounding errors only: zero, unless more digits say otherwise.
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

    def of_power(self, base_tree: tuple[Any, ...], exponent_tree: tuple[Any, ...]) -> Value:
        base, exponent = self.value(base_tree), self.value(exponent_tree)
        if abs(exponent) > _MAX_EXPONENT:
            _unsupported("large exponent")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent)
            if base == 0 and exponent <= 0:
                raise ZeroDivisionError
            if bits <= _MAX_BITS:
                return Fraction(base ** int(exponent))
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and base >= 0 and exponent.denominator <= 6:
            root = _exact_root(base, exponent.denominator)
            if root is not None and abs(exponent.numerator) <= 64 and root != 0:
                return Fraction(root**exponent.numerator)
        integral = isinstance(exponent, Fraction) and exponent.denominator == 1
        if base_tree != ("e",) and not integral:
            self.note_branch(base)
        return self.context.power(self.inexact(base), self.inexact(exponent))

    def note_branch(self, value: Value) -> None:
        self.on_branch |= not (_is_real(value) and value.real >= 0)

    def of_root(self, radicand_tree: tuple[Any, ...], degree_tree: tuple[Any, ...]) -> Value:
        radicand, degree = self.value(radicand_tree), self.value(degree_tree)
        if isinstance(degree, Fraction) and degree.denominator == 1 and 1 <= degree <= 100:
            number = int(degree)
            if isinstance(radicand, Fraction) and radicand >= 0:
                root = _exact_root(radicand, number)
                if root is not None:
                    return root
            inexact = self.inexact(radicand)
            if number % 2 and _is_real(inexact) and inexact.real < 0:
                return -self.context.root(-inexact.real, number)
            self.note_branch(inexact)
            return self.context.sqrt(inexact) if number == 2 else self.context.root(inexact, number)
        self.note_branch(radicand)
        return self.context.power(self.inexact(radicand), 1 / self.inexact(degree))

    def of_factorial(self, tree: tuple[Any, ...]) -> Value:
        value = self.value(tree)
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            if value > _MAX_FACTORIAL:
                _unsupported("large factorial")
            return Fraction(math.factorial(int(value)))
        return self.context.factorial(self.inexact(value))

    def of_binomial(self, top_tree: tuple[Any, ...], bottom_tree: tuple[Any, ...]) -> Value:
        top, bottom = self.value(top_tree), self.value(bottom_tree)
        if abs(top) > _MAX_FACTORIAL or abs(bottom) > _MAX_FACTORIAL:
            _unsupported("large binomial")
        value = self.context.binomial(self.inexact(top), self.inexact(bottom))
        if all(isinstance(part, Fraction) and part.denominator == 1 for part in (top, bottom)) and abs(value) < 1e40:
            return Fraction(int(self.context.nint(value)))
        return value

    def of_absolute(self, tree: tuple[Any, ...]) -> Value:
        return abs(self.value(tree))

    def of_floor(self, tree: tuple[Any, ...]) -> Value:
        return self.rounded(self.value(tree), self.context.floor)

    def of_ceil(self, tree: tuple[Any, ...]) -> Value:
        return self.rounded(self.value(tree), self.context.ceil)

    def rounded(self, value: Value, rule: Any) -> Value:
        if not _is_real(value) or abs(value) > 10**30:
            _unsupported("rounding")
        return Fraction(int(rule(self.inexact(value))))

    def of_function(self, name: str, argument: tuple[Any, ...]) -> Value:
        value = self.inexact(self.value(argument))
        if abs(value) > _MAX_EXPONENT and name in ("exp", "sinh", "cosh", "tanh"):
            _unsupported("large exponent")
        if abs(value) > 1e30 and name not in ("ln", "log10", "atan"):
            _unsupported("large argument")
        if name == "ln" and value == 0:
            raise ZeroDivisionError
        if name in ("ln", "log10"):
            self.note_branch(value)
        if name in ("asin", "acos"):
            self.on_branch |= not (_is_real(value) and abs(value) <= 1)
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
    """Return the largest integer whose power is at most `value` (Newton's method in integers)."""
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // degree)
    while True:
        better = ((degree - 1) * guess + value // guess ** (degree - 1)) // degree
        if better >= guess:
            return guess
        guess = better
