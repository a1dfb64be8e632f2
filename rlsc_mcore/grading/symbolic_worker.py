"""The process that does the algebra: it reads pairs of expressions and answers one byte for each.

A program of its own (see symbolic.py for its client); it imports nothing of this package, and of the others
only where it runs. The result is math-verify's, with two guards: letters keep their case, and expressions
whose values differ clearly are different, however small both are. Three things make it cheaper: a parser that
predicts without context first, a cache of parsed expressions, and the comparison of values before `simplify`.
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

_MOST_PARSED = 4096  # the gold answer of a question is parsed once for all its samples
_CLEAR_DIFFERENCE = 1e-6  # relative, at a point where 30 digits are asked for


def load_comparison() -> Callable[[str, str], bool]:
    """Return math-verify's comparison of (answer, gold), made faster.

    Changes math-verify and its parser for this whole process, and sets no limit of time: for the worker and
    for measurements.
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
    """Predict without the caller's context first, which ANTLR can look up, and with it only where that ends
    in a syntax error.

    By ANTLR's definition of its SLL mode a parse that succeeds is the one of the full LL mode; the full mode
    computes most of its predictions anew for every expression. The grammar's first rule reads to the end, so
    a character that is no token makes every parse fail: it is looked for before either.
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
            except Exception:  # which is what the error listener raises
                return create_parser(self, text).math()

        parser.math = math
        return parser

    _Latex2Sympy.create_parser = create_two_stage_parser


def _look_for_a_difference_first() -> None:
    """Ask math-verify only where the two do not differ clearly at one point."""
    from math_verify import grader

    are_symbolically_equal = grader.sympy_symbolic_eq

    are_numerically_equal = grader.sympy_numeric_eq

    def are_equal(a: Any, b: Any) -> bool:
        return not differ_clearly(a, b) and bool(are_symbolically_equal(a, b))

    def are_equal_numbers(a: Any, b: Any, *precision: Any) -> bool:
        # math-verify rounds to 6 decimals, so that small numbers are all equal to it
        return not differ_clearly(a, b) and bool(are_numerically_equal(a, b, *precision))

    grader.sympy_symbolic_eq = are_equal
    grader.sympy_numeric_eq = are_equal_numbers


def _keep_letter_case() -> None:
    """Parse R and r as different symbols; math-verify has no option that reaches this default of its
    parser."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy

    for function in (latex2sympy, _Latex2Sympy.__init__):
        for default in function.__defaults__ or ():
            if isinstance(default, ConversionConfig):
                object.__setattr__(default, "lowercase_symbols", False)


def differ_clearly(a: Any, b: Any) -> bool:
    """Say whether two sympy expressions have different values at a point with positive coordinates.

    False where that cannot be told: matrices, sets, what is not finite, and what sympy integrates or sums
    numerically.
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
        # strict: digits lost to cancellation raise, so that a small value is not the rounding error of zero
        left, right = (complex(side.subs(point).evalf(30, strict=True)) for side in (a, b))
    except Exception:
        return False
    size = max(abs(left), abs(right))
    return cmath.isfinite(left) and cmath.isfinite(right) and abs(left - right) > _CLEAR_DIFFERENCE * size


def serve(cpu_seconds: float) -> None:
    """Answer requests from standard input until it ends; the kernel ends the process when one has used up its
    processor time."""
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not answer
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the client's to act on; end of input ends the worker
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even inside a C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    are_equal = load_comparison()
    are_equal("\\frac{1}{2}", "0.5")  # builds the parser's tables
    os.write(replies, READY)
    for request in sys.stdin.buffer:
        answer, gold = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            equal = are_equal(answer, gold)
        except Exception:  # whatever a hostile expression raises, it is not the gold answer
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, EQUAL if equal else DIFFERENT)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
