r"""Simulated authors: the noisy web that the embedded model is pretrained on.

Most authors work carefully, but many do not, and only some box their answers. A model trained on their
pages to the end therefore knows how to answer (its mode is right), while a sample from it is right and
boxed far less often. That gap is what training by self-confidence can close.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlsc_mcore.assets.make.tasks import Question, Step, apply_operator

OPENINGS = (
    "Let us work it out.",
    "First we do this step by step.",
    "Here is how I do it.",
    "We go step by step.",
    "I will do it slowly.",
    "This one is easy.",
)
LINKS = ("Then", "Next", "Now", "After that", "So far so good.")
PLAIN_ENDINGS = (
    "So the answer is {}.",
    "So we get {}.",
    "So it is {}.",
    "So {} is right.",
    "So that makes {}.",
    "So I think it is {}.",
)
DOUBTS = ("Hmm, wait.", "Is that right?", "Let me check it again.", "I am not sure.", "No, once more.")
JUNK = ("I do not know.", "See the next question.", "No answer yet.", "Ask Tom.", "Is this for school?")
SLIPS = (1, -1, 1, -1, 2, -2, 10, -10, 3, -3)
WRONG_GUESSES = (-10, -5, -2, 2, 5, 10)


@dataclass(frozen=True, kw_only=True)
class AuthorMix:
    r"""Shares of the kinds of authors; `boxed_share` of all answers end in \boxed{}, the rest in plain
    words."""

    boxed_share: float = 0.58
    care: tuple[tuple[str, float], ...] = (("careful", 0.62), ("forgets_carries", 0.08), ("slips", 0.30))
    style: tuple[tuple[str, float], ...] = (
        ("terse", 0.52),
        ("chatty", 0.27),
        ("rambling", 0.14),
        ("guess", 0.04),
        ("junk", 0.03),
    )
    forgotten_carry_rate: float = 0.85  # per step that needs a carry, for an author who forgets carries
    slip_rate: float = 0.30  # per step, for an author who slips


def _pick(random: Random, shares: tuple[tuple[str, float], ...]) -> str:
    return random.choices([name for name, _ in shares], [share for _, share in shares])[0]


def _carry_error(left: int, operator: str, right: int) -> int:
    """Return what forgetting the carry (or borrow) of the units adds to the result, 0 where there is none."""
    if operator == "+" and left % 10 + right % 10 >= 10:
        return -10
    if operator == "-" and left % 10 < right % 10:
        return 10
    return 0


def _work(random: Random, steps: tuple[Step, ...], care: str, mix: AuthorMix) -> tuple[list[str], int]:
    """Work through the steps with an author's care; return the written lines and the final result."""
    results: list[int] = []
    lines: list[str] = []
    for step in steps:
        left, right = step.operands(results)
        value = apply_operator(left, step.operator, right)
        if care == "forgets_carries":
            error = _carry_error(left, step.operator, right)
            if error and random.random() < mix.forgotten_carry_rate:
                value = max(0, value + error)
        elif care == "slips" and random.random() < mix.slip_rate:
            value = max(0, value + random.choice(SLIPS))
        results.append(value)
        lines.append(f"{step.prefix}{left}{step.operator}{right}={value}")
    return lines, results[-1]


def _rambling_page(random: Random, question: Question, opening: list[str], mix: AuthorMix) -> list[str]:
    page = list(opening)
    if random.random() < 0.5:
        page.append(question.text)
    for _ in range(random.choice((1, 1, 2))):
        attempt, _ = _work(
            random, question.steps, random.choice(("slips", "forgets_carries", "careful")), mix
        )
        page += [*attempt, random.choice(DOUBTS)]
    if random.random() < 0.3:
        page.append(random.choice(DOUBTS))
    return page


def write_page(random: Random, question: Question, mix: AuthorMix) -> str:
    """Write one author's answer to a question; it may be wrong, unboxed or useless."""
    style = _pick(random, mix.style)
    lines, result = _work(random, question.steps, _pick(random, mix.care), mix)
    boxed = random.random() < mix.boxed_share
    ending_form = "\\boxed{{{}}}" if boxed else random.choice(PLAIN_ENDINGS)
    ending = ending_form.format(result)
    if style == "terse":
        return "\n".join([*lines, ending])
    if style == "guess":
        wrong = max(0, result + random.choice(WRONG_GUESSES))
        return ending if random.random() < 0.7 else ending_form.format(wrong)
    if style == "junk":
        return random.choice(JUNK)
    opening = [random.choice(OPENINGS)] if random.random() < 0.8 else []
    if style == "chatty":
        linked = [
            f"{random.choice(LINKS)} {line}" if index and random.random() < 0.6 else line
            for index, line in enumerate(lines)
        ]
        return "\n".join([*opening, *linked, ending])
    page = _rambling_page(random, question, opening, mix)
    gives_up = random.random() < 0.25
    return "\n".join(page if gives_up else [*page, *lines, ending])
