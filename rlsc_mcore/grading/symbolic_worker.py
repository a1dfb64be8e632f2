"""Run the worker process of symbolic.py: read pairs of expressions and write one byte per pair.

This file imports nothing from this package, and imports math-verify inside functions. The result is that of
math-verify with two changes: letters are case-sensitive, and expressions whose values clearly differ are
different even if both values are small. Three optimizations: the parser first predicts without context,
parsed expressions are cached, and values are compared before `simplify`.
"""

import cmath
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

READY, EQUAL, DIFFERENT = b"r", b"1", b"0"
MEMORY_LIMIT_BYTES = 2 << 30

_MOST_PARSED = 4096  # cache size; the gold answer of a question is parsed once for all its samples
_CLEAR_DIFFERENCE = 1e-6  # relative difference of values that are computed with 30 digits


def load_comparison() -> Callable[[str, str], bool]:
    """Return a faster version of math-verify's comparison of (answer, gold).

    Patches math-verify and its parser in this process and sets no time limit. Call it only in the worker and
    in benchmarks.
    """
    import logging

    from math_verify import parse, verify  # type: ignore[import-untyped, unused-ignore]

    logging.disable(logging.CRITICAL)
    _parse_in_two_stages()
    _look_for_a_difference_first()
    _keep_letter_case()

    @functools.lru_cache(maxsize=_MOST_PARSED)
    def parsed(text: str) -> Any:
        return parse(f"${text}$", parsing_timeout=0)

    def are_equal(answer: str, gold: str) -> bool:
        return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))

    return are_equal


def _parse_in_two_stages() -> None:
    """Parse in ANTLR's SLL mode first, and in the full LL mode only after a syntax error.

    SLL predictions ignore the caller's context and can be cached. By ANTLR's definition, a successful SLL
    parse equals the LL parse; the LL mode recomputes most predictions for every expression. The first rule of
    the grammar reads to the end of the text, so a character that is no token makes both parses fail. All
    tokens are read first to detect this early.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    create_parser = _Latex2Sympy.create_parser

    def create_two_stage_parser(self: Any, text: str) -> Any:
        parser = create_parser(self, text)
        parser.getTokenStream().fill()
        parser._interp.predictionMode = PredictionMode.SLL
        predict_fast = parser.math

        def math() -> Any:
            try:
                return predict_fast()
            except Exception:  # the error listener raises plain Exception
                return create_parser(self, text).math()

        parser.math = math
        return parser

    _Latex2Sympy.create_parser = create_two_stage_parser


def _look_for_a_difference_first() -> None:
    """Return "different" without math-verify if the values of two expressions clearly differ at one point."""
    from math_verify import grader

    are_symbolically_equal = grader.sympy_symbolic_eq

    are_numerically_equal = grader.sympy_numeric_eq

    def are_equal(a: Any, b: Any) -> bool:
        return not differ_clearly(a, b) and bool(are_symbolically_equal(a, b))

    def are_equal_numbers(a: Any, b: Any, *precision: Any) -> bool:
        # math-verify rounds to 6 decimals, so it finds all small numbers equal
        return not differ_clearly(a, b) and bool(are_numerically_equal(a, b, *precision))

    grader.sympy_symbolic_eq = are_equal
    grader.sympy_numeric_eq = are_equal_numbers


def _keep_letter_case() -> None:
    """Make the parser read R and r as different symbols; math-verify has no option for this default."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy

    for function in (latex2sympy, _Latex2Sympy.__init__):
        for default in function.__defaults__ or ():
            if isinstance(default, ConversionConfig):
                object.__setattr__(default, "lowercase_symbols", False)


def differ_clearly(a: Any, b: Any) -> bool:
    """Return whether two sympy expressions have clearly different values at a point with positive
    coordinates.

    Returns False if this is undecided: for matrices, sets, values that are not finite, and expressions that
    sympy integrates or sums numerically.
    """
    import sympy

    inexact = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
    if not all(
        isinstance(side, sympy.Expr) and not isinstance(side, sympy.MatrixExpr) and not side.has(*inexact)
        for side in (a, b)
    ):
        return False
    try:
        names = sorted(a.free_symbols | b.free_symbols, key=str)
        point = {name: sympy.Rational(1009 + 211 * place, 997) for place, name in enumerate(names)}
        # `strict` raises if cancellation loses digits, so a small value is not a rounding error of zero
        left, right = (complex(side.subs(point).evalf(30, strict=True)) for side in (a, b))
    except Exception:
        return False
    size = max(abs(left), abs(right))
    return cmath.isfinite(left) and cmath.isfinite(right) and abs(left - right) > _CLEAR_DIFFERENCE * size


def serve(cpu_seconds: float) -> None:
    """Answer requests from standard input until it ends.

    The kernel ends the process if one request exceeds `cpu_seconds` of CPU time.
    """
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output of libraries must not be read as a reply
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the client handles Ctrl-C; the worker ends at the end of its input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even inside a C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    are_equal = load_comparison()
    are_equal("\\frac{1}{2}", "0.5")  # the first comparison builds the tables of the parser
    os.write(replies, READY)
    for request in sys.stdin.buffer:
        answer, gold = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            equal = are_equal(answer, gold)
        except Exception:  # an expression that raises is not equal to the gold answer
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, EQUAL if equal else DIFFERENT)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
