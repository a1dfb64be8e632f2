"""Arithmetic questions with one whole-number answer, drawn at random from five families.

A question carries its worked solution as a chain of steps, so that simulated authors (`authors.py`) can
follow it, rightly or wrongly. Numbers stay small: the questions must be learnable by a model of less than
one million parameters, and it is the authors' noise, not the size of the numbers, that leaves room for
confidence training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

PEOPLE = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs")
LARGEST_CHAIN_RESULT = 79  # keeps every intermediate sum at two digits in nearly all questions


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The result of an earlier step as an operand: 1 is the last result, 2 the one before it."""

    steps_back: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of a worked solution, `prefix left operator right = value`."""

    left: int | Earlier
    operator: str
    right: int | Earlier
    prefix: str = ""

    def operands(self, results: list[int]) -> tuple[int, int]:
        """Return both operands, looking `Earlier` ones up in the results so far."""
        return tuple(  # type: ignore[return-value]
            results[-operand.steps_back] if isinstance(operand, Earlier) else operand
            for operand in (self.left, self.right)
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its solution; `answer` follows from the steps."""

    family: str
    text: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """Return the right answer by working through the steps."""
        results: list[int] = []
        for step in self.steps:
            left, right = step.operands(results)
            results.append(apply_operator(left, step.operator, right))
        return results[-1]


LAST = Earlier(steps_back=1)
BEFORE_LAST = Earlier(steps_back=2)


def apply_operator(left: int, operator: str, right: int) -> int:
    """Compute one step; division rounds, so that a solution with an earlier mistake can still go on."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator == "/":
        return round(left / right)
    raise ValueError(f"operator must be one of + - * /, got {operator!r}")


def _chained_steps(start: int, changes: list[tuple[str, int]]) -> tuple[Step, ...]:
    return tuple(
        Step(left=start if index == 0 else LAST, operator=operator, right=amount)
        for index, (operator, amount) in enumerate(changes)
    )


def _chain(random: Random) -> Question:
    while True:
        start = value = random.randint(5, 30)
        changes: list[tuple[str, int]] = []
        for _ in range(random.choice((2, 3, 3))):
            amount = random.randint(2, 20)
            operator = "+" if value < amount or random.random() < 0.55 else "-"
            value = apply_operator(value, operator, amount)
            changes.append((operator, amount))
        if value <= LARGEST_CHAIN_RESULT:
            break
    expression = str(start) + "".join(f"{operator}{amount}" for operator, amount in changes)
    return Question(family="chain", text=f"Compute {expression}.", steps=_chained_steps(start, changes))


def _word(random: Random) -> Question:
    person, thing = random.choice(PEOPLE), random.choice(THINGS)
    start = value = random.randint(8, 35)
    changes: list[tuple[str, int]] = []
    events: list[str] = []
    for _ in range(random.choice((2, 2, 3))):
        if value < 6 or random.random() < 0.5:
            operator, amount = "+", random.randint(2, 20)
            verb = random.choice(("buys", "finds", "gets"))
        else:
            operator, amount = "-", random.randint(2, min(20, value - 1))
            verb = random.choice(("sells", "loses", "gives away"))
        value = apply_operator(value, operator, amount)
        changes.append((operator, amount))
        events.append(f"{verb} {amount}")
    story = ", ".join(events[:-1]) + " and " + events[-1]
    text = f"{person} has {start} {thing}, {story}. How many {thing} are left?"
    return Question(family="word", text=text, steps=_chained_steps(start, changes))


def _boxes(random: Random) -> Question:
    person, thing = random.choice(PEOPLE), random.choice(THINGS)
    boxes, per_box = random.randint(2, 6), random.randint(2, 9)
    if random.random() < 0.5:
        operator, verb, amount = "+", "gets", random.randint(2, 20)
    else:
        operator, verb, amount = "-", "loses", random.randint(2, min(20, boxes * per_box - 1))
    text = f"{person} has {boxes} boxes of {per_box} {thing} and {verb} {amount}. How many {thing} are left?"
    steps = (
        Step(left=boxes, operator="*", right=per_box),
        Step(left=LAST, operator=operator, right=amount),
    )
    return Question(family="boxes", text=text, steps=steps)


def _equation(random: Random) -> Question:
    factor, unknown, constant = random.randint(2, 6), random.randint(2, 12), random.randint(2, 30)
    total = factor * unknown + constant
    steps = (
        Step(left=total, operator="-", right=constant, prefix=f"{factor}x="),
        Step(left=LAST, operator="/", right=factor, prefix="x="),
    )
    return Question(family="equation", text=f"Solve {factor}x+{constant}={total}.", steps=steps)


def _cost(random: Random) -> Question:
    first, second = random.sample(THINGS, 2)
    first_price, second_price = random.randint(2, 9), random.randint(2, 9)
    first_count, second_count = random.randint(2, 5), random.randint(2, 5)
    text = (
        f"What do {first_count} {first} at {first_price} and {second_count} {second} at {second_price} cost?"
    )
    steps = (
        Step(left=first_count, operator="*", right=first_price),
        Step(left=second_count, operator="*", right=second_price),
        Step(left=BEFORE_LAST, operator="+", right=LAST),
    )
    return Question(family="cost", text=text, steps=steps)


FAMILIES: dict[str, tuple[Callable[[Random], Question], float]] = {
    # name: (how to draw one, share of all questions)
    "chain": (_chain, 0.28),
    "word": (_word, 0.23),
    "boxes": (_boxes, 0.18),
    "equation": (_equation, 0.17),
    "cost": (_cost, 0.14),
}


def draw_question(random: Random) -> Question:
    """Draw one question of a random family."""
    names = tuple(FAMILIES)
    (name,) = random.choices(names, [FAMILIES[name][1] for name in names])
    return FAMILIES[name][0](random)
