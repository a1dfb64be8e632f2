"""Parse the LaTeX of final answers into trees. A tree is a tuple; its first item is the type of the node."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

Tree = tuple[Any, ...]

_MAX_DEPTH = 40
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
    [
        "vec",
        "hat",
        "bar",
        "tilde",
        "dot",
        "ddot",
        "overline",
        "widehat",
        "overrightarrow",
        "mathcal",
        "mathscr",
        "mathfrak",
    ]
)
_FUNCTIONS = {
    **{
        name: name for name in ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "ln"]
    },
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


class UnsupportedError(Exception):
    """Raised if the text is not an expression that this module supports."""


def unsupported(reason: str) -> Any:
    raise UnsupportedError(reason)


@lru_cache(maxsize=16384)
def parse(text: str) -> tuple[Tree, frozenset[str]] | None:
    """Return the tree of a text and the names in it; None if the text is not a supported expression."""
    try:
        parser = _Parser(text)
        return parser.whole(), frozenset(parser.names)
    except (UnsupportedError, RecursionError, ValueError):
        return None


class _Parser:
    """A recursive descent parser for one text."""

    def __init__(self, text: str) -> None:
        if len(text) > 1000:
            unsupported("too long")
        self.tokens = [match.group().strip() for match in _TOKEN.finditer(text)]
        self.starts = [match.start() for match in _TOKEN.finditer(text)]
        self.text = text
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.names: set[str] = set()

    def whole(self) -> Tree:
        tree = self.sum()
        return tree if self.position == len(self.tokens) else unsupported("trailing text")

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.next
        if not token or (expected and token not in expected):
            unsupported(f"expected {expected}")
        self.position += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            unsupported("too deep")
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

    def product(self) -> Tree:
        factors = [(1, self.power())]
        while True:
            token = self.next
            if token in ("*", "\\cdot", "\\times", "/", "\\div"):
                self.take()
                sign = 1
                while self.next in ("+", "-"):
                    sign *= -1 if self.take() == "-" else 1
                factor = self.power()
                factors.append(
                    (-1 if token in ("/", "\\div") else 1, factor if sign > 0 else ("sum", ((-1, factor),)))
                )
            elif self.begins_factor():
                self.check_juxtaposed_numbers()
                factors.append((1, self.power()))
            else:
                break
        return ("product", tuple(factors)) if len(factors) > 1 else factors[0][1]

    def check_juxtaposed_numbers(self) -> None:
        """Raise UnsupportedError at `18 18`, `x2` and `\\frac{1}{2}3`, which are ambiguous."""
        before = self.tokens[self.position - 1]
        touching = self.position < len(self.starts) and not self.text[self.starts[self.position]].isspace()
        if self.next[0].isdigit() and (before[-1].isdigit() or touching):
            unsupported("a number after a factor")

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

    def power(self) -> Tree:
        base = self.atom()
        while self.next in ("!", "^"):
            if self.take() == "!":
                base = ("factorial", base)
                if self.next == "!":
                    unsupported("double factorial")
            else:
                base = ("power", base, self.argument())
        return base

    def argument(self) -> Tree:
        """Parse the argument of a command or of `^`: a group or one token."""
        token = self.next
        if token == "{":
            return self.group()
        if token in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            return ("sum", ((sign, self.atom()),))
        if token and token[0].isdigit():
            return ("number", self.number(self.take()))
        return self.atom()

    def group(self) -> Tree:
        opening = self.take()
        closing = _CLOSING[opening]
        bars, self.bars = self.bars, opening == "|"
        tree = self.sum()
        self.take(closing)
        self.bars = bars
        return tree

    def number(self, token: str) -> Fraction:
        return Fraction(token.replace(",", ""))

    def atom(self) -> Tree:
        token = self.next
        if not token:
            unsupported("nothing where a value is expected")
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
        return unsupported(f"unknown token {token}")

    def read_mixed(self, whole: Fraction, token: str) -> Tree:
        following = self.tokens[self.position : self.position + 7]
        if (
            token.isdigit()
            and len(following) == 7
            and following[0] == "\\frac"
            and following[1] == following[4] == "{"
        ):
            top, bottom = following[2], following[5]
            if (
                top.isdigit()
                and bottom.isdigit()
                and int(top) < int(bottom)
                and following[3] == following[6] == "}"
            ):
                self.position += 7
                return ("number", whole + Fraction(int(top), int(bottom)))
        return ("number", whole)

    def command(self, name: str) -> Tree:
        if name == "frac":
            return self.fraction()
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
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
            return self.letter(text) if len(text) == 1 and text.isalpha() else unsupported("text")
        return self.name("\\" + name) if name in _GREEK else unsupported(f"unknown command {name}")

    def fraction(self) -> Tree:
        start = self.position
        top_text, bottom_text = self.raw_argument(), self.raw_argument()
        if _DIFFERENTIAL.fullmatch(top_text) and _DIFFERENTIAL.fullmatch(bottom_text):
            return self.name(f"derivative {top_text} by {bottom_text}")
        self.position = start
        return ("product", ((1, self.argument()), (-1, self.argument())))

    def function(self, name: str) -> Tree:
        base, power = None, None
        if self.next == "_":
            self.take()
            base = self.argument()
        if self.next == "^":
            self.take()
            power = self.argument()
        argument = self.function_argument()
        if name == "log" and base is not None:
            tree: Tree = ("product", ((1, ("ln", argument)), (-1, ("ln", base))))
        elif base is not None:
            return unsupported("index of a function")
        elif power == ("sum", ((-1, ("number", Fraction(1))),)):
            return (_INVERSES[name], argument) if name in _INVERSES else unsupported("inverse")
        else:
            tree = (_FUNCTIONS[name], argument)
        return tree if power is None else ("power", tree, power)

    def function_argument(self) -> Tree:
        if self.next in ("(", "[", "{"):
            return self.group()
        factors = [(1, self.power())]
        while self.begins_factor() and self.next[1:] not in _FUNCTIONS and self.next not in ("(", "["):
            self.check_juxtaposed_numbers()
            factors.append((1, self.power()))
        return ("product", tuple(factors)) if len(factors) > 1 else factors[0][1]

    def letter(self, letter: str) -> Tree:
        if letter in ("e", "i") and self.next not in ("_", "'"):
            return (letter,)
        at_zero = self.tokens[self.position : self.position + 3] == ["(", "0", ")"]
        if self.next == "(" and (letter in _OPAQUE_FUNCTIONS or at_zero):
            self.names.add(letter)
            return ("opaque", letter, self.group())
        return self.name(letter)

    def name(self, name: str) -> Tree:
        while self.next in ("_", "'"):
            if self.take() == "'":
                name += "'"
            else:
                name += "_" + self.raw_argument()
        self.names.add(name)
        return ("name", name)

    def raw_argument(self) -> str:
        """Return the text of a group or of one token, without white space and text commands."""
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
