"""Grading: hand-made right and wrong pairs of every answer format, hostile answers, and what counts as an
extracted answer."""

import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.grading import equality as grading
from rlsc_mcore.grading.answers import Grade, extract_boxed, extract_last_number, grade, is_correct
from rlsc_mcore.grading.symbolic import SymbolicComparer, symbolic_comparer

PUBLIC_SETS = Path(os.environ.get("RLSC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")

RIGHT = [
    # integers, floats, thousands separators, zero padding, signs
    *[
        ("18", "18"),
        (" 18 ", "18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("27", "27.0"),
        ("27.00", "27.0"),
        ("025", "25"),
        ("+7", "7"),
    ],
    *[
        ("-3", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("1,234", "1234"),
        ("70000", "70,000"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
    ],
    *[
        ("5\\!,000", "5000"),
        ("1,234,567.50", "1234567.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("1e3", "1000"),
        ("2.5E-1", "0.25"),
    ],
    *[("9007199254740993", "9007199254740993")],
    # money, delimiters, text, units, percent, degrees
    *[
        ("$18", "18"),
        ("\\$18.00", "18"),
        ("$18$", "18"),
        ("\\(18\\)", "18"),
        ("\\[18\\]", "18"),
        ("$$18$$", "18"),
        ("\\text{18}", "18"),
    ],
    *[
        ("5 cm", "5"),
        ("5\\text{ cm}", "5"),
        ("12 apples", "12"),
        ("12 apples per day.", "12"),
        ("1,200 dollars", "1200"),
    ],
    *[
        ("50\\%", "50"),
        ("50%", "50"),
        ("50", "50\\%"),
        ("50\\%", "0.5"),
        ("90^\\circ", "90"),
        ("90 degrees", "90"),
        ("x=5", "5"),
    ],
    # fractions, roots, powers, constants
    *[
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\dfrac{2}{4}", "\\frac{1}{2}"),
    ],
    *[
        ("-\\frac{3}{4}", "-0.75"),
        ("\\frac{-3}{4}", "-\\frac{3}{4}"),
        ("3\\frac{1}{2}", "3.5"),
        ("10/5", "2"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
    ],
    *[
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
        ("2^{10}", "1024"),
        ("5!", "120"),
        ("2\\pi", "\\pi\\cdot2"),
    ],
    # algebra, intervals, sets, tuples, matrices
    *[
        ("x^2+2x+1", "(x+1)^2"),
        ("2+3i", "3i+2"),
        ("(1,2]", "(1, 2]"),
        ("\\left(1,2\\right)", "(1,2)"),
        ("\\{2,1\\}", "\\{1,2\\}"),
    ],
    *[
        ("(5,\\infty)\\cup(-\\infty,3)", "(-\\infty,3)\\cup(5,\\infty)"),
        ("(\\frac{1}{2},3)", "(0.5,3)"),
        ("1, 2", "2,1"),
    ],
    *[
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("y=2x+1", "2x+1=y"),
    ],
    # words and letters
    *[
        ("Evelyn", "\\text{Evelyn}"),
        ("\\text{evelyn}", "Evelyn"),
        ("B", "B"),
        ("(B)", "B"),
        ("\\text{B}", "B"),
        ("\\textbf{(B)}", "B"),
    ],
]

WRONG = [
    *[
        ("17", "18"),
        ("-18", "18"),
        ("18.5", "18"),
        ("1.8", "18"),
        ("180", "18"),
        ("1,8", "18"),
        ("27", "2.7"),
        ("1e3", "100"),
    ],
    *[
        ("9007199254740992", "9007199254740993"),
        ("0.33", "\\frac{1}{3}"),
        ("0.333333", "\\frac13"),
        ("1/0", "5"),
        ("0/0", "0/1"),
    ],
    *[
        ("", "18"),
        (" ", "18"),
        (".", "18"),
        ("", ""),
        ("$$", "0"),
        ("\\text{}", "0"),
        ("\\boxed{}", "0"),
        ("?", "3"),
        ("None", "3"),
    ],
    *[
        ("5x", "5"),
        ("5 million", "5"),
        ("5\\text{ dozen}", "5"),
        ("5 or 6", "5"),
        ("5 and x", "5"),
        ("6 cm", "5"),
        ("50\\%", "5"),
    ],
    *[
        ("5 plus x", "5"),
        ("x=6", "5"),
        ("\\frac{1}{3}", "\\frac{1}{2}"),
        ("2/1", "1/2"),
        ("\\sqrt{2}", "2"),
        ("2\\sqrt{3}", "\\sqrt{8}"),
    ],
    *[
        ("x^2+1", "(x+1)^2"),
        ("3i-2", "2+3i"),
        ("[1,2]", "(1,2)"),
        ("(2,1)", "(1,2)"),
        ("(1,2)", "(1,3)"),
        ("\\{1\\}", "\\{1,2\\}"),
    ],
    *[
        ("\\{1,2,3\\}", "\\{1,2\\}"),
        ("(-\\infty,3)", "(-\\infty,3)\\cup(5,\\infty)"),
        ("1", "1,2"),
        ("1,2", "1"),
        ("y=2x-1", "y=2x+1"),
    ],
    *[
        ("nylevE", "Evelyn"),
        ("\\text{Eve}", "\\text{Evelyn}"),
        ("C", "B"),
        ("even", "odd"),
        ("Evelyn 5", "Evelyn"),
        ("18 18", "18"),
    ],
    *[
        ("18 (mod 5)", "3"),
        ("the answer", "3"),
        ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ],
]

HOSTILE = [
    "\\frac{" * 300,
    "{" * 40,
    "9" * 999,
    "9" * 100_000,
    "-" * 5000,
    "x" * 999,
    "\\boxed{" * 100,
    "\x00",
    "\ud800",
    "\\",
    "$",
    "\\int\\sum\\lim",
    "1" + "{,}000" * 160,
    "\\begin{matrix}" * 60,
    "1/" * 400,
    "__import__('os').abort()",
    "\N{ARABIC-INDIC DIGIT FIVE}\N{SUPERSCRIPT TWO}",
    "9^{9^{9}}",
    "((9!)!)!",
    "2^{100000}" * 80,
    "x^{x^{x^{x}}}",
    "e^{e^{e^{e}}}",
    "\\sqrt[100]{" * 20 + "2" + "}" * 20,
    "\\frac{1}{3}^{30000}" * 40,
    "1e4999" + "*1e4999" * 100,
    "(" * 200 + "1" + ")" * 200,
    "(-" * 200 + "1" + ")" * 200,
    "\\binom{3000}{1500}" * 50,
    "1e99999",
    ", ".join(f"x_{{{i}}}" for i in range(90)),
]


@pytest.fixture(scope="module", autouse=True)
def worker_ends_with_the_module() -> Iterator[None]:
    yield
    symbolic_comparer.close()


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right_answers(answer: str, gold: str) -> None:
    assert is_correct(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong_answers(answer: str, gold: str) -> None:
    assert not is_correct(answer, gold)


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_raise_nothing(answer: str) -> None:
    assert not is_correct(answer, "5")
    assert not grade(answer + f"\\boxed{{{answer}}}" + answer, "5").strict


def test_comparison_that_python_cannot_interrupt_is_ended() -> None:
    comparer = SymbolicComparer(cpu_seconds_per_comparison=0.5)
    start = time.monotonic()
    try:
        assert not comparer.are_equal("10^{10^{10}}", "5")  # one C call of hours and gigabytes
        assert time.monotonic() - start < 40
        assert comparer.are_equal("\\sqrt{8}", "2\\sqrt{2}")  # the next one has a new worker
    finally:
        comparer.close()


def test_worker_ended_from_outside_costs_no_grade() -> None:
    comparer = SymbolicComparer()
    try:
        assert comparer.are_equal("\\sqrt{8}", "2\\sqrt{2}")
        worker = comparer._worker
        assert worker is not None
        worker.send_signal(signal.SIGTERM)
        worker.wait()
        assert comparer.are_equal("\\sqrt{8}", "2\\sqrt{2}") and comparer._worker is not worker
    finally:
        comparer.close()


def test_grading_in_threads_agrees_with_grading_alone() -> None:
    roots = [f"\\sqrt{{{square}}}" for square in range(2, 26)]
    expected = [math.isqrt(square) ** 2 == square and str(math.isqrt(square)) for square in range(2, 26)]
    failures: list[str] = []

    def work(seed: int) -> None:
        order = list(range(len(roots)))
        random.Random(seed).shuffle(order)
        for position in order:
            gold = expected[position] or "2.5"
            if symbolic_comparer.are_equal(roots[position], gold) != bool(expected[position]):
                failures.append(roots[position])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def _grade_in_child(results: "multiprocessing.SimpleQueue[bool]") -> None:
    results.put(
        symbolic_comparer.are_equal("\\sqrt{18}", "3\\sqrt{2}")
        and not symbolic_comparer.are_equal("\\sqrt{18}", "3")
    )
    symbolic_comparer.close()


def test_forked_child_has_its_own_worker() -> None:
    assert symbolic_comparer.are_equal("\\sqrt{8}", "2\\sqrt{2}")
    worker = symbolic_comparer._worker
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with symbolic_comparer._lock:  # held by another thread at the time of the fork, as it may be
        child = context.Process(target=_grade_in_child, args=(results,))
        child.start()
    child.join(120)
    assert child.exitcode == 0 and results.get()
    assert symbolic_comparer._worker is worker and symbolic_comparer.are_equal("\\sqrt{8}", "2\\sqrt{2}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{18}.", "18"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{1,\\{2\\}\\right\\}}", "\\left\\{1,\\{2\\}\\right\\}"),
        ("\\boxed{\\{1,2}", "\\{1,2"),  # an escaped brace opens no group
        ("\\boxed{ {a}{b{c}} }", "{a}{b{c}}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{9}", "9"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{a} } \\boxed{b}", "b"),
        ("{ \\boxed{b}", "b"),
        ("\\boxed{5} so \\boxed{6", "5"),  # cut before it closed
        ("\\boxed{5} so \\boxed{}", "5"),
        ("\\boxed{6", None),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("\\boxed 42.", "42"),
        ("= $\\boxed -3$", "-3"),
        ("Mark your solution with \\boxed\nAnswer: 5", None),
        ("boxed{5}", None),
        ("\\boxedx{5}", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 apples, so 18.", "18"),
        ("It costs $1,234.50.", "1,234.50"),
        ("= -3", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("10-7", "7"),
        ("(2)-7", "7"),
        ("x = -0.5 m", "-0.5"),
        ("the answer is 3/4.", "3/4"),
        ("the answer is $\\frac{3}{4}$", "\\frac{3}{4}"),
        ("-\\dfrac{3}{4}", "-\\dfrac{3}{4}"),
        ("area is 50 cm^2", "50"),
        ("area is 50 cm^{12}", "50"),
        ("x_1 = 4 and x_{12}", "4"),
        ("1e3 metres", "1e3"),
        ("1, 2 and 3", "3"),
        ("12,345,678", "12,345,678"),
        ("1,2345", "2345"),
        (".5", ".5"),
        ("50%", "50"),
        ("none", None),
        ("x^2", None),
        ("", None),
    ],
)
def test_extract_last_number(text: str, expected: str | None) -> None:
    assert extract_last_number(text) == expected


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("3+5=8, so \\boxed{8}.", "8", Grade(strict=True, lenient=True, boxed=True, extracted="8")),
        ("So Tom has 8.", "8", Grade(strict=False, lenient=True, boxed=False, extracted="8")),
        ("\\boxed{7}, no: 8", "8", Grade(strict=False, lenient=False, boxed=True, extracted="7")),
        ("\\boxed{8} in 5 steps", "8", Grade(strict=True, lenient=True, boxed=True, extracted="8")),
        ("\\boxed{}, that is 8", "8", Grade(strict=False, lenient=True, boxed=False, extracted="8")),
        ("8 apples and then \\boxed{", "8", Grade(strict=False, lenient=True, boxed=False, extracted="8")),
        ("no idea", "8", Grade(strict=False, lenient=False, boxed=False, extracted=None)),
        ("", "8", Grade(strict=False, lenient=False, boxed=False, extracted=None)),
        (
            "so $\\boxed{\\frac{8}{3}}$",
            "8/3",
            Grade(strict=True, lenient=True, boxed=True, extracted="\\frac{8}{3}"),
        ),
    ],
)
def test_grade(response: str, gold: str, expected: Grade) -> None:
    assert grade(response, gold) == expected


@given(st.text(st.sampled_from("0123456789,./-\\{}$ boxedfrac^_%e\n"), max_size=60))
def test_extraction_laws_on_any_text(text: str) -> None:
    boxed = extract_boxed(text)
    assert boxed is None or (boxed and boxed in text)
    number = extract_last_number(text)
    assert number is None or number in text
    # A box appended to any text is the last one.
    assert extract_boxed(text + " \\boxed{7}") == "7"
    assert extract_last_number(text + " is 7.") == "7"


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_integers_compare_as_integers_in_every_spelling(answer: int, gold: int, zeros: int) -> None:
    spellings = [
        str(answer),
        f"{answer:,}",
        f"{answer}.{'0' * zeros}",
        f"${answer}$",
        f"{answer:,}".replace(",", "{,}"),
        f"{answer}/1",
    ]
    for spelling in spellings:
        assert is_correct(spelling, str(gold)) == (answer == gold)
        assert grade(f"Thus \\boxed{{{spelling}}}", str(answer)).strict
        assert grade(f"Thus = {spelling}.", str(answer)).lenient or "{,}" in spelling


def test_plain_numbers_need_no_worker_and_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "compare_symbolically", None)
    start, count = time.process_time(), 0
    while (seconds := time.process_time() - start) < 0.2:
        assert grade(
            f"3 + {count} = 5, then 12 * 7 = 84. The answer is \\boxed{{{count}}}.", "18"
        ).strict == (count == 18)
        count += 1
    assert count / seconds > 5000


@pytest.mark.skipif(
    not PUBLIC_SETS.is_dir(), reason="the public question sets are not on this machine (RLSC_DATA_DIR)"
)
@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k_test"])
def test_gold_answers_of_public_sets_match_themselves_alone(name: str) -> None:
    golds = [question.answer or "" for question in read_questions(str(PUBLIC_SETS / f"{name}.jsonl"))]
    for gold, other in zip(golds, golds[1:] + golds[:1], strict=True):
        assert grade(f"I think \\boxed{{{gold}}}", gold).strict
        assert grade(f"I think it is {gold}.", gold).lenient
        assert is_correct(other, gold) == (float(other) == float(gold))
