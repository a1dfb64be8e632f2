"""Every benchmark's own answer format, by hand-made right and wrong pairs; the graders in parallel agree with
themselves alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rlsc_mcore.grading.answers import is_correct
from rlsc_mcore.grading.formats import extract_choice, grade_answer
from rlsc_mcore.grading.symbolic import symbolic_comparer
from rlsc_mcore.types import Question


@pytest.fixture(scope="module", autouse=True)
def worker_ends_with_the_module() -> object:
    yield
    symbolic_comparer.close()


# (boxed answer, gold): AIME integers, AMC floats, GSM8K finals, MATH-500 LaTeX, Minerva units and scientific
# notation.
RIGHT = [
    *[
        ("025", "25"),
        ("33", "033"),
        ("540", "540"),
        ("104.0", "104"),
        ("27", "27.0"),
        ("36.0", "36"),
        ("9", "9.00"),
        ("-1", "-1.0"),
    ],
    *[
        ("70,000", "70000"),
        ("$1,234", "1234"),
        ("18 dollars", "18"),
        ("20\\%", "20\\%"),
        ("5\\text{ hours}", "5"),
        ("64^\\circ", "64"),
    ],
    *[
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})"),
        ("p-q", "p - q"),
        ("\\frac{14}{3}", "14/3"),
        ("3\\sqrt{13}", "\\sqrt{117}"),
    ],
    *[
        ("6 - 5i", "-5i+6"),
        ("\\dfrac{3}{56}", "\\frac{3}{56}"),
        ("(-2,1)", "(-2, 1)"),
        ("[-2,7]", "[-2, 7]"),
        ("x \\in [-2,7]", "[-2,7]"),
    ],
    *[
        ("(3,4]", "(3, 4]"),
        ("\\text{even}", "\\text{even}"),
        ("10, -10", "-10, 10"),
        ("2k + 2", "2(k+1)"),
        ("\\pi", "\\pi"),
        ("11\\sqrt2", "11\\sqrt{2}"),
    ],
    *[
        ("\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix}-7\\\\16\\\\5\\end{pmatrix}"),
        ("0.0833", "0.0833"),
    ],
    *[
        ("144", "12^2"),
        ("\\frac{1}{2}\\sqrt{3}", "\\frac{\\sqrt{3}}{2}"),
        ("e^{2}", "e^2"),
        ("\\log_2 8", "3"),
        ("\\binom{5}{2}", "10"),
    ],
]
WRONG = [
    *[
        ("26", "025"),
        ("205", "25"),
        ("27.5", "27.0"),
        ("36.01", "36"),
        ("7000", "70,000"),
        ("20", "21\\%"),
        ("-64", "64"),
    ],
    *[
        ("(\\frac{\\pi}{2}, 3)", "(3, \\frac{\\pi}{2})"),
        ("q-p", "p - q"),
        ("\\frac{13}{3}", "14/3"),
        ("\\sqrt{13}", "\\sqrt{117}"),
    ],
    *[
        ("6 + 5i", "6 - 5i"),
        ("(-2,7)", "[-2, 7]"),
        ("[3,4)", "(3, 4]"),
        ("odd", "\\text{even}"),
        ("10", "-10, 10"),
        ("2k+1", "2(k+1)"),
    ],
    *[
        ("2\\pi", "\\pi"),
        ("\\begin{pmatrix} -7 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix}-7\\\\16\\\\5\\end{pmatrix}"),
        ("0.083", "0.0833"),
    ],
    *[
        ("e^{3}", "e^2"),
        ("\\binom{5}{1}", "10"),
        ("-3", "3"),
        ("\\infty", "3"),
        ("3/14", "14/3"),
        ("\\text{none}", "0"),
    ],
]
# (response, letter it names, however it is boxed or said)
CHOICES = [
    *[
        ("\\boxed{B}", "B"),
        ("\\boxed{(B)}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{(B)}}", "B"),
        ("\\boxed{B.}", "B"),
    ],
    *[
        ("\\boxed{B) 5 m/s}", "B"),
        ("\\boxed{\\text{(C) } 12}", "C"),
        ("\\boxed{$D$}", "D"),
        ("\\boxed{\\mathrm{A}}", "A"),
        ("\\boxed{A:}", "A"),
    ],
    *[
        ("The answer is (C).", "C"),
        ("answer: B", "B"),
        ("So the correct option is D", "D"),
        ("I choose (A) since (B) is absurd. Answer: A", "A"),
    ],
    *[
        ("thinking...\nC\n", "C"),
        ("it must be (D)", "D"),
        ("Therefore the choice is option B.", "B"),
        ("(A), no: (C)", "C"),
    ],
]
NO_CHOICE = ["\\boxed{5}", "\\boxed{Both}", "I am not sure", "\\boxed{}", "", "A dog ran", "\\boxed{BC}"]
# What a box or a response says -> the letter that it names, None where it names none or several.
BOXED_CHOICES = {
    **dict.fromkeys(
        (
            *("b", "(b)", "B", "(B)", "[B]", "{B}", "B.", "B)", "B:", " B ", "**B**", "$B$", "`B`", '"B"', "\\text{Option B}", "Option B", "option (b)"),
            *("\\text{choice (B)}", "\\boldsymbol{B}", "\\mathsf{B}", "\\mathbf{(B)}", "\\textbf{B}", "\\mathrm{B}", "\\text{(B) }5", "B 5 m/s"),
            *("B \\text{ (5 m/s)}", "\\text{The answer is B}", "\\text{B: 5 m/s}", "(B) 5 m/s", "B. 5 m/s", "B: 5", "\\textbf{(B)}\\ 5", "\\text{B. both A and C}"),
            *("\\fbox{B}", "\\color{red}{B}", "The correct answer is (B).", "B \\quad 7", "B)", "B, since 5 is larger"),
        ),
        "B",
    ),
    **dict.fromkeys(
        (
            *("B, C", "B, D", "B and C", "B or C", "B/C", "B & D", "(B), (C)", "(B)(C)", "BC", "\\text{B and C}", "B; C", "both", "5", "none"),
            *("a catalyst", "A catalyst", "I think so", "K", "AB", "B C", "\\text{B, C}", "B, C, D", "b, c"),
        ),
        None,
    ),
    "A": "A", "a": "A", "(a)": "A", "A 5 m/s": "A", "A. a catalyst": "A", "\\text{(A) a catalyst}": "A", "I": "I", "j": "J",
}  # fmt: skip
SAID_CHOICES = {
    "The right choice is a catalyst.": None,
    "The answer is I think not listed.": None,
    "The best choice is a longer wire: (B)": "B",
    "Hence (D) is right, as (A) has the wrong sign.": "D",
    'The answer is "C".': "C",
    "The answer is $C$.": "C",
    "It must be C": "C",
    "It must be C, because A is too small.": "C",
    "**B**": "B",
    "$B$": "B",
    "... so B": "B",
    "Therefore, the answer is **(C)**.": "C",
    "The answer is \\text{B}.": "B",
    "Answer: b": "B",
    "the answer is (c) 5 m/s": "C",
    "The correct option is D.": "D",
    "I would choose option C.": "C",
    "(A) is wrong, (B) is wrong. The correct answer is (C), not (D).": "C",
    "The answer is B and C.": None,
    "The answer is (A) or (B).": None,
    "The answer is B: a catalyst": "B",
    "A catalyst speeds up a reaction.": None,
    "Both options are possible": None,
    "First answer: A. No, the final answer is D.": "D",
    "Option (B) is correct.": "B",
    "I pick E": "E",
    "The answer is A.": "A",
    "The answer is A 5 m/s wind": "A",
    "": None,
}
# (boxed answer, gold, tolerance): OlympiadBench.
CLOSE = [
    *[
        ("3.14", "3.1416", 0.01),
        ("2.05", "2.0", 0.05),
        ("1.5 \\text{ m}", "1.52", 0.1),
        ("6.7 \\times 10^{-3}", "0.0067", 1e-4),
    ],
    *[
        ("1.1, 2.1", "1.0, 2.0", 0.1),
        ("2.1, 1.1", "1.0, 2.0", 0.1),
        ("$12.34$", "$12.3$", 0.1),
        ("1,000.4", "1000", 0.5),
    ],
    *[("-0.5", "-0.46", 0.05), ("42.3 cm", "42.25", 0.1), ("5.0e-3", "0.005", 1e-5)],
    *[
        ("\\frac{22}{7}", "3.1416", 0.01),
        ("\\sqrt{2}", "1.41", 0.01),
        ("x = 2\\pi", "6.28", 0.01),
        ("1.5\\times 10^3", "1500.2", 0.5),
    ],
]
FAR = [
    *[
        ("3.2", "3.1416", 0.01),
        ("2.06", "2.0", 0.05),
        ("1.1", "1.0, 2.0", 0.1),
        ("1.1, 2.1, 3", "1.0, 2.0", 0.1),
        ("x", "1", 0.5),
    ],
    *[
        ("-0.5", "0.46", 0.05),
        ("6.7 \\times 10^{3}", "0.0067", 1e-4),
        ("", "1", 5.0),
        ("3.14", "3.1416", None),
        ("1.05x+2", "1.0", 0.1),
    ],
]
LISTS = [
    *[
        ("2, 1", "1, 2"),
        ("(1,2), (3,4)", "(3,4), (1,2)"),
        ("\\frac{1}{2}, \\sqrt{8}", "2\\sqrt{2}, 0.5"),
        ("1 \\text{ and } 2", "2, 1"),
    ],
    *[("x+1; x-1", "x-1; 1+x"), ("1, 2, 3, 4", "4, 3, 2, 1")],
]
NO_LISTS = [("1, 2", "1, 3"), ("1", "1, 2"), ("(1,2), (4,3)", "(3,4), (1,2)"), ("1, 1", "1, 2")]


def graded(boxed: str, gold: str, tolerance: float | None = None) -> bool:
    return grade_answer(f"so \\boxed{{{boxed}}}.", Question(0, "q", gold, tolerance=tolerance)).strict


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right_answers(answer: str, gold: str) -> None:
    assert graded(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong_answers(answer: str, gold: str) -> None:
    assert not graded(answer, gold)


@pytest.mark.parametrize(("response", "letter"), CHOICES)
def test_choices(response: str, letter: str) -> None:
    for gold in "ABCD":
        result = grade_answer(response, Question(0, "q", gold, answer_format="choice"))
        assert result.lenient == (gold == letter)
        assert result.strict == (gold == letter and "boxed" in response)
        assert result.extracted == letter


@pytest.mark.parametrize("response", NO_CHOICE)
def test_no_choice_is_right_for_no_letter(response: str) -> None:
    assert not any(
        grade_answer(response, Question(0, "q", gold, answer_format="choice")).lenient for gold in "ABCD"
    )


@pytest.mark.parametrize(("boxed", "letter"), BOXED_CHOICES.items())
def test_boxed_choices(boxed: str, letter: str | None) -> None:
    for gold in "ABCDEIJ":
        assert grade_answer(
            f"so $\\boxed{{{boxed}}}$.", Question(0, "q", gold, answer_format="choice")
        ).strict == (gold == letter)


@pytest.mark.parametrize(("response", "letter"), SAID_CHOICES.items())
def test_said_choices(response: str, letter: str | None) -> None:
    for gold in "ABCDEI":
        result = grade_answer(response, Question(0, "q", gold, answer_format="choice"))
        assert result.lenient == (gold == letter) and not result.strict


def test_a_letter_is_one_letter() -> None:
    assert [extract_choice(text) for text in ("B", "(b)", "AB", "K", "A and B", "A. first", "")] == [
        "B",
        "B",
        None,
        None,
        None,
        "A",
        None,
    ]


@pytest.mark.parametrize(("answer", "gold", "tolerance"), CLOSE)
def test_close_numbers(answer: str, gold: str, tolerance: float) -> None:
    assert graded(answer, gold, tolerance)


@pytest.mark.parametrize(("answer", "gold", "tolerance"), FAR)
def test_far_numbers(answer: str, gold: str, tolerance: float | None) -> None:
    assert not graded(answer, gold, tolerance)


@pytest.mark.parametrize(("answer", "gold"), LISTS)
def test_lists_in_any_order(answer: str, gold: str) -> None:
    assert graded(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), NO_LISTS)
def test_other_lists(answer: str, gold: str) -> None:
    assert not graded(answer, gold)


def test_unboxed_answers_within_a_tolerance_are_lenient() -> None:
    result = grade_answer("it is 3.14", Question(0, "q", "3.1416", tolerance=0.01))
    assert result.lenient and not result.strict and not result.boxed


@pytest.mark.parametrize(
    "answer",
    ["\\frac{" * 300, "1," * 2000, "10^{10^{10}}", "(" * 500, "\\text{and}" * 300, "9" * 5000, "\x00, \x00"],
)
def test_hostile_lists_are_wrong(answer: str) -> None:
    assert not graded(answer, "1, 2", 0.1)
    assert not grade_answer(f"\\boxed{{{answer}}}", Question(0, "q", "A", answer_format="choice")).strict


def test_parallel_grading_agrees_with_grading_alone() -> None:
    cases = [(answer, gold, True) for answer, gold in RIGHT] + [
        (answer, gold, False) for answer, gold in WRONG
    ]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda case: is_correct(case[0] + " ", case[1]), cases))
    assert found == [expected for _, _, expected in cases]
