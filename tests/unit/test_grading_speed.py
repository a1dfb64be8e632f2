"""Grading many answers: the worker decides as math-verify does, and nothing is compared twice."""

import itertools
import multiprocessing
import random
import threading
from collections.abc import Iterator

import pytest
import sympy
from math_verify import parse, verify

from benchmarks.bench_grading import algebra, families
from rlsc_mcore.grading import equality as grading
from rlsc_mcore.grading.formats import grade_answer, grade_answers
from rlsc_mcore.grading.symbolic import comparers, symbolic_comparer
from rlsc_mcore.grading.symbolic_worker import differ_clearly
from rlsc_mcore.types import Question
from tests.unit.test_grading import RIGHT, WRONG

x, y = sympy.symbols("x y", real=True)


@pytest.fixture(scope="module", autouse=True)
def workers_end_with_the_module() -> Iterator[None]:
    yield
    for comparer in comparers:
        comparer.close()


def plain(answer: str, gold: str) -> bool:
    """math-verify as it comes: this process does not have the worker's changes."""
    return bool(
        verify(*(parse(f"${text}$", parsing_timeout=0) for text in (gold, answer)), timeout_seconds=None)
    )


def test_the_worker_says_what_math_verify_says() -> None:
    generated = [
        pair
        for gold, equal, different in itertools.islice(families(random.Random(7)), 14)
        for answer in (*equal, *different)
        for pair in ((answer, gold), (gold, answer))
    ]
    broken = [
        ("\\frac{1}{", "\\frac{1}{2}"),
        ("x = = 2", "2"),
        ("\\triangle ABC", "ABC"),
        ("a=b=3", "3"),
        ("(1,", "(1,2)"),
        ("1 \\implies 2", "2"),
    ]
    pairs = [*generated, *broken, *RIGHT[::4], *WRONG[::4]]
    found = [symbolic_comparer.are_equal(*pair) for pair in pairs]
    assert found == [plain(*pair) for pair in pairs]
    assert 30 < sum(found) < len(found) - 30


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((x + y) ** 3, x**3 + 3 * x**2 * y + 3 * x * y**2 + y**3),
        (sympy.sin(x) ** 2 + sympy.cos(x) ** 2, sympy.Integer(1)),
        (sympy.sqrt(2) / 2, 1 / sympy.sqrt(2)),
        (sympy.log(x * y), sympy.log(x) + sympy.log(y)),
        (sympy.sqrt(x**2), x),  # equal at positive values: not to be ruled out by one
        (sympy.exp(sympy.I * sympy.pi), sympy.Integer(-1)),
        (sympy.sqrt(5 + 2 * sympy.sqrt(6)), sympy.sqrt(2) + sympy.sqrt(3)),
        (x, x + sympy.Float("1e-9")),  # too close to tell
        (sympy.Integral(x, x), x**2),  # numerical integration is not exact
        (sympy.zoo, x),
        (sympy.nan, sympy.Integer(1)),
        (sympy.Matrix([1]), sympy.Matrix([2])),
        (sympy.Interval(0, 1), sympy.Interval(0, 2)),
    ],
    ids=str,
)
def test_what_may_be_equal_is_never_ruled_out(a: object, b: object) -> None:
    assert not differ_clearly(a, b) and not differ_clearly(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (sympy.sqrt(8), 3),
        (x, y),
        (x + 1, x + 2),
        (x**2, x**3),
        (2 * sympy.I, 2),
        (sympy.pi, sympy.Rational(22, 7)),
    ],
)
def test_other_values_differ(a: sympy.Expr, b: object) -> None:
    assert differ_clearly(a, sympy.sympify(b))


def test_many_answers_are_graded_as_one_by_one() -> None:
    others = [
        ("so \\boxed{B}", Question(99, "q", "B", answer_format="choice")),
        ("nothing", Question(7, "q", "8")),
    ]
    samples = [*algebra(14, distinct=False), *others]
    responses, questions = [response for response, _ in samples], [question for _, question in samples]
    grades = grade_answers(responses, questions)
    assert grades == [grade_answer(*sample) for sample in samples]
    assert any(found.strict for found in grades) and not all(found.strict for found in grades)
    assert grade_answers([], []) == []


def test_a_pair_is_compared_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls: list[tuple[str, str]] = []

    def compare(answer: str, gold: str) -> bool:
        calls.append((answer, gold))
        begun.set()
        assert go_on.wait(30)
        return True

    monkeypatch.setattr(grading, "compare_symbolically", compare)
    comparisons = grading._Comparisons(most=2)
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(comparisons.of("a+b", "b+a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and calls == [("a+b", "b+a")]
    for answer in ("c", "d", "a+b"):  # the oldest of more than two is forgotten
        comparisons.of(answer, "b+a")
    assert [answer for answer, _ in calls] == ["a+b", "c", "d", "a+b"]


def test_a_comparison_that_cannot_run_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(answer: str, gold: str) -> bool:
        raise RuntimeError("no worker")

    monkeypatch.setattr(grading, "compare_symbolically", fail)
    comparisons = grading._Comparisons()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no worker"):
            comparisons.of("a", "b")
    monkeypatch.setattr(grading, "compare_symbolically", lambda answer, gold: True)
    assert comparisons.of("a", "b")


def test_a_forked_child_does_not_wait_for_its_parents_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = grading._Comparisons()
    begun, go_on = threading.Event(), threading.Event()

    def compare(answer: str, gold: str) -> bool:
        begun.set()
        return go_on.wait(60)

    monkeypatch.setattr(grading, "compare_symbolically", compare)
    thread = threading.Thread(target=comparisons.of, args=("a", "b"))
    thread.start()
    assert begun.wait(30)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def grade_in_child() -> None:
        grading.compare_symbolically = lambda answer, gold: True
        results.put(comparisons.of("a", "b"))

    with comparisons._lock:  # as another thread may hold it at that moment
        child = context.Process(target=grade_in_child)
        child.start()
    child.join(60)
    go_on.set()
    thread.join()
    assert child.exitcode == 0 and results.get()
