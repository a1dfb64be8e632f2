"""A user's reward function in worker processes: values, limits, and one line for every error."""

import re
from pathlib import Path

import pytest

from rlsc_mcore.config import AlgorithmConfig, ConfigError, RolloutConfig, RunError
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.grading.reward_hook import RewardWorker, check_reward_function, function_rewards
from rlsc_mcore.grading.rewards import trained_rollouts
from rlsc_mcore.types import Question, Rollout

PROGRAMS = Path(__file__).parents[2] / "examples" / "program_reward.py"
SOURCE = """
def length(response, question, answer):
    print("noise")
    return len(response) + (answer is None)

def broken(response, question, answer):
    return 1 / len(response[1:])

def text(response, question, answer):
    return "much"

def limits(response, question, answer):
    if response == "time":
        while True:
            pass
    if response == "memory":
        return len(bytearray(3 << 30))
    if response == "exit":
        import os
        os._exit(1)
    return 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


def test_rewards_become_advantages(file: str) -> None:
    assert function_rewards(f"{file}:length", ["ab", "", "ab"], Question(0, "?", None)) == [3.0, 1.0, 3.0]
    rollouts = [
        Rollout(0, i, (1,), (i,), (-1.0,), "stop", 0, text=text) for i, text in enumerate(("a", "abc"))
    ]
    algorithm = AlgorithmConfig(objective="rlvr", reward_function=f"{file}:length")
    graded = trained_rollouts(algorithm, RolloutConfig(num_samples=2), rollouts, [Question(0, "?", "4")])
    assert [value for _, value in graded] == [-1.0, 1.0]


def test_an_answer_beyond_a_limit_gets_nothing_and_the_next_one_is_rewarded(file: str) -> None:
    worker = RewardWorker(f"{file}:limits", cpu_seconds=0.5)
    question = Question(0, "?", None)
    assert [worker.reward(text, question) for text in ("a", "time", "a", "memory", "exit", "a")] == [
        1.0,
        0.0,
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    worker.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", "line 7: ZeroDivisionError: division by zero"),
        ("text", "expected a finite number, got 'much'"),
    ],
)
def test_a_failing_function_is_named_in_one_line(file: str, name: str, expected: str) -> None:
    with pytest.raises(
        RunError, match=re.escape(f"{file}:{name} failed on an answer to question 3")
    ) as caught:
        function_rewards(f"{file}:{name}", ["a"], Question(3, "?", None))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_bad_functions_are_refused_before_anything_is_built(file: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_like_this\n", encoding="utf-8")
    for path, expected in [
        (f"{file}:absent", "it has no function 'absent'"),
        (f"{tmp_path / 'bad.py'}:f", "importing it failed: line 1: ModuleNotFoundError"),
        (f"{tmp_path / 'none.py'}:f", "no such file"),
        ("mine.py", "expected file.py:function"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
            check_reward_function(path)
        assert str(caught.value).startswith("algorithm.reward_function: ") and "\n" not in str(caught.value)
    required = [
        "--run-dir",
        "run",
        "--model.path",
        "m",
        "--data.path",
        "d",
        "--algorithm.reward-function",
        "a.py:f",
    ]
    with pytest.raises(ConfigError, match=r"algorithm\.reward_function: expected nothing with .* rlsc"):
        parse_config(required)
    assert parse_config([*required, "--algorithm.objective", "grpo"]).algorithm.reward_function == "a.py:f"


def test_the_program_reward_of_the_examples() -> None:
    question = Question(0, "What does (3 + 4) * 2 give?", None)
    responses = ["so \\boxed{14}", "\\boxed{13}", "14", "\\boxed{1} \\boxed{14}"]
    assert function_rewards(f"{PROGRAMS}:reward", responses, question) == [1.0, 0.0, 0.0, 1.0]
    other = Question(1, "What does 9**9**9**9 give?", None)
    assert function_rewards(f"{PROGRAMS}:reward", ["\\boxed{1}"], other) == [0.0]
