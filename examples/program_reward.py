"""Reward a solver of arithmetic programs: run the program of the question, compare its result with the box.

    rlsc train --config configs/tiny_cpu.yaml --run-dir runs/programs --data.path programs.jsonl \
        --algorithm.objective grpo --algorithm.reward-function examples/program_reward.py:reward

A line of programs.jsonl is {"question": "What does (3 + 4) * 2 give?"}: no label is needed, because Python
computes it. Only arithmetic on numbers is executed, so the program of a model is safe to run.
"""

import ast
import operator
import re

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_BOX = re.compile(r"\\boxed\{(-?[0-9]+)\}")
_PROGRAM = re.compile(r"[0-9(][-+*/() 0-9]*[0-9)]")
_STEP = re.compile(r"([0-9]+)([-+*])([0-9]+)=")
_LARGEST = 10**12


def run(node: ast.AST) -> int:
    """Return the value of an arithmetic expression; raises ValueError for anything else."""
    if isinstance(node, ast.Expression):
        return run(node.body)
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= _LARGEST:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](run(node.left), run(node.right))
        if abs(value) <= _LARGEST:
            return int(value)
    raise ValueError("not an arithmetic program")


def read_program(response: str) -> str | None:
    """Return the arithmetic program of a worked solution, None if it has none or does not run.

    Lines `2*3=6` and `6+18=24` are the program 2*3+18: the values that the model wrote do not matter.
    """
    steps = _STEP.findall(response)
    if len(steps) < 2:
        return None
    (first, operation, second), (_, next_operation, third), *_ = steps
    program = f"{first}{operation}{second}{next_operation}{third}"
    try:
        run(ast.parse(program, mode="eval"))
    except (ValueError, SyntaxError):  # also a number with a leading zero
        return None
    return program


def proposal(response: str, question: str, answer: str | None) -> float:
    """Return 1 for a response with a program that runs, else 0."""
    return float(read_program(response) is not None)


def reward(response: str, question: str, answer: str | None) -> float:
    """Return 1 for the right result in the last box, 0 for a wrong one or none."""
    boxes, program = _BOX.findall(response), _PROGRAM.search(question)
    if not boxes or program is None:
        return 0.0
    try:
        return float(run(ast.parse(program[0], mode="eval")) == int(boxes[-1]))
    except (ValueError, SyntaxError, ZeroDivisionError):
        return 0.0
