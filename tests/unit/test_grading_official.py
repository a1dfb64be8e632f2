"""The rules of the evaluation script of Qwen2.5-Math, from its own cases and from its code's stated
tolerances."""

import pytest

from rlsc_mcore.grading.formats import grade_answer
from rlsc_mcore.grading.official import extract_official, extract_official_choice
from rlsc_mcore.types import Question

CLOSE = [
    *[
        ("0.0833333333333333", r"\frac{1}{12}"),
        ("(1,4.5)", r"(1,\frac{9}{2})"),
        (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"),
    ],
    *[
        (r"\sec^2(y)", r"\tan^2(y)+1"),
        ("-34x-45y+20z-100=0", "34x+45y-20z+100=0"),
        ("(0.6,2.6667]", r"(\frac{3}{5},\frac{8}{3}]"),
    ],
    *[
        ("3.14159", r"\pi"),
        ("1.41421", r"\sqrt{2}"),
        ("0.5", "50"),
        ("5000", "50"),
        ("50", "50\\%"),
        ("100.009", "100"),
        ("[1,2]", "(1,2)"),
    ],
    *[
        ("yes", "Yes"),
        ("y=5", "5"),
        ("1,234", "1234"),
        (r"4.5\times 10^{33}", "4.5e33"),
        ("0.33333", r"\frac{1}{3}"),
    ],
]
FAR = [
    *[
        ("1.42", r"\sqrt{2}"),
        ("x+1", "x+2n+1"),
        ("100.02", "100"),
        (r"\frac{1+\sqrt{5}}{2}", "2"),
        ("(1,2)", "(2,1)"),
        ("7", "8"),
    ],
    *[("(+5)(b+2)", "(a+5)(b+2)"), (r"\frac{100}{3}", "33.3"), ("", "5")],
]
EXTRACTED = {
    r"So \boxed{7} and \boxed{8}.": "8",
    "Therefore the answer is $x+1$.": "$x+1$",
    "The final answer is: 12": "12",
    "3 apples and 1,250 pears": "1250",
    "it is -0.5": "-0.5",
    "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.": "\\frac{1}{2}",
    "none": "",
}
CHOICES = {
    "The answer is (C).": "C",
    "Choice A is wrong. The answer is (D) because B is not.": "D",
    r"\boxed{B}": "B",
    "I think A or D": "D",
    "no letter here": None,
    "The answer is B, C": "B",
}


@pytest.mark.parametrize(("answer", "gold"), CLOSE)
def test_close_answers(answer: str, gold: str) -> None:
    assert grade_answer(f"so $\\boxed{{{answer}}}$", Question(0, "q", gold), "qwen").strict


@pytest.mark.parametrize(("answer", "gold"), FAR)
def test_far_answers(answer: str, gold: str) -> None:
    assert not grade_answer(f"so $\\boxed{{{answer}}}$", Question(0, "q", gold), "qwen").strict


@pytest.mark.parametrize(("response", "expected"), EXTRACTED.items())
def test_extraction(response: str, expected: str) -> None:
    assert extract_official(response) == expected


@pytest.mark.parametrize(("response", "letter"), CHOICES.items())
def test_letters(response: str, letter: str | None) -> None:
    assert extract_official_choice(response) == letter
    result = grade_answer(response, Question(0, "q", letter or "A", answer_format="choice"), "qwen")
    assert result.strict == result.lenient == (letter is not None)


@pytest.mark.parametrize(
    ("response", "boxed", "lenient", "qwen"),
    [
        (r"\boxed{5}", True, True, True),
        ("The answer is 5.", False, True, True),
        ("so 3 and then 5", False, True, True),
        (r"\boxed{6}, no: the answer is 5", False, False, False),
        (r"\boxed{5.0001}", False, False, True),
        (r"\boxed{500}", False, False, True),
        ("the answer is 5.0003", False, False, True),
    ],
)
def test_what_each_grader_counts_as_right(response: str, boxed: bool, lenient: bool, qwen: bool) -> None:
    question = Question(0, "q", "5")
    assert [grade_answer(response, question, grader).strict for grader in ("boxed", "lenient", "qwen")] == [
        boxed,
        lenient,
        qwen,
    ]
