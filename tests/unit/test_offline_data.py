"""Files of answers: what is read, and one line that names file and line for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.offline import encode_answers, read_offline
from rlsc_mcore.objectives import OBJECTIVES

PAIR = {"prompt": "2 + 2?", "chosen": "\\boxed{4}", "rejected": "\\boxed{5}"}
REWARD = {"prompt": "2 + 2?", "response": "\\boxed{4}", "reward": -0.5}


def write(folder: Path, *records: Any) -> str:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def test_pairs_and_rewards(tmp_path: Path) -> None:
    questions, answers = read_offline(write(tmp_path, PAIR, PAIR | {"prompt": " next "}), OBJECTIVES["dpo"])
    assert [(question.index, question.text, question.answer) for question in questions] == [
        (0, "2 + 2?", None),
        (1, "next", None),
    ]
    assert [(one.text, one.advantage) for one in answers[0]] == [("\\boxed{4}", 1.0), ("\\boxed{5}", -1.0)]
    _, answers = read_offline(write(tmp_path, REWARD), OBJECTIVES["offline_rewards"])
    assert [(one.text, one.advantage) for one in answers[0]] == [("\\boxed{4}", -0.5)]


@pytest.mark.parametrize(
    ("objective", "record", "expected"),
    [
        ("dpo", REWARD, "no `chosen`: algorithm.objective dpo needs `prompt`, `chosen`, `rejected`"),
        ("dpo", {"problem": "?", "answer": "4"}, "no `prompt`"),
        ("dpo", [PAIR, "text"], "expected a JSON object, got list"),
        ("dpo", PAIR | {"rejected": PAIR["chosen"]}, "are the same text"),
        ("dpo", PAIR | {"chosen": [{"role": "assistant", "content": "4"}]}, "got a list of messages"),
        ("dpo", PAIR | {"chosen": "  "}, "`chosen`: expected text that is not empty"),
        ("dpo", PAIR | {"prompt": 4}, "`prompt`: expected text"),
        ("dpo", PAIR | {"chosen": "\ud800"}, "`chosen`: an unpaired surrogate"),
        ("offline_rewards", PAIR, "no `response`: algorithm.objective offline_rewards needs"),
        ("offline_rewards", REWARD | {"reward": "1"}, "`reward`: expected a finite number, got '1'"),
        ("offline_rewards", REWARD | {"reward": True}, "`reward`: expected a finite number"),
        ("offline_rewards", REWARD | {"reward": float("nan")}, "`reward`: expected a finite number"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, objective: str, record: Any, expected: str) -> None:
    good = PAIR if objective == "dpo" else REWARD
    path = write(tmp_path, good, record)
    with pytest.raises(ConfigError) as caught:
        read_offline(path, OBJECTIVES[objective])
    message = str(caught.value)
    assert message.startswith(f"data.path: {path}, line 2: ") and expected in message and "\n" not in message


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="holds no answers; write one JSON object per line with `prompt`, `c"
    ):
        read_offline(write(tmp_path), OBJECTIVES["dpo"])


class Letters:
    """One token per character; "|" is split off as an end token's text."""

    eos_token_id = 0
    unk_token_id = None
    chat_template = None

    class _Special:
        content, special = "<end>", True

    def __init__(self) -> None:
        self.added_tokens_decoder = {0: self._Special()}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter.lower()) for letter in text]


def test_tokens_and_their_errors(tmp_path: Path) -> None:
    def encoded(record: dict[str, Any], limit: int = 20) -> Any:
        _, answers = read_offline(write(tmp_path, PAIR, record), OBJECTIVES["dpo"])
        return encode_answers(answers, [[1, 2], [1, 2]], Letters(), "none", limit)

    assert encoded(PAIR | {"chosen": "ab", "rejected": "c"})[1] == ((97, 98, 0), (99, 0))
    with pytest.raises(ConfigError, match="line 2: an answer holds the control token '<end>'"):
        encoded(PAIR | {"chosen": "a<end>"})
    with pytest.raises(ConfigError, match="line 2: prompt and answer have 25 tokens, the limit is 20"):
        encoded(PAIR | {"rejected": "x" * 22})
    with pytest.raises(ConfigError, match="line 2: both answers have the same tokens"):
        encoded(PAIR | {"chosen": "A", "rejected": "a"})
