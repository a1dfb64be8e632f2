"""Read answers from a file instead of sampling them: `prompt, chosen, rejected` or `prompt, response,
reward`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import read_records
from rlsc_mcore.data.records import check_encodable, list_fields, shorten
from rlsc_mcore.data.templates import find_control_tokens, turn_end_ids
from rlsc_mcore.objectives import Objective
from rlsc_mcore.types import OfflineAnswer, Question

PAIR_FIELDS = ("prompt", "chosen", "rejected")
REWARD_FIELDS = ("prompt", "response", "reward")


def read_offline(
    path: str, objective: Objective, *, split: str = "train", field: str = "data.path"
) -> tuple[list[Question], list[tuple[OfflineAnswer, ...]]]:
    """Read one question and its answers per record: chosen and rejected, or one rewarded response.

    Files as for `read_questions`. Raises ConfigError naming `field`, the file and the line.
    """
    questions: list[Question] = []
    answers: list[tuple[OfflineAnswer, ...]] = []
    for index, (place, record) in enumerate(read_records(path, split=split, field=field)):
        needed = PAIR_FIELDS if objective.needs_pairs else REWARD_FIELDS
        if not isinstance(record, Mapping):
            raise ConfigError(f"{place}: expected a JSON object, got {type(record).__name__}")
        absent = [name for name in needed if record.get(name) is None]
        if absent:
            wanted = f"algorithm.objective {objective.name} needs `{'`, `'.join(needed)}`"
            raise ConfigError(f"{place}: no `{absent[0]}`: {wanted}, got {list_fields(record)}")
        questions.append(Question(index, _text(record, "prompt", place), None))
        answers.append(_read_pair(record, place) if objective.needs_pairs else _read_reward(record, place))
    if not questions:
        fields = PAIR_FIELDS if objective.needs_pairs else REWARD_FIELDS
        raise ConfigError(
            f"{field}: {path} holds no answers; write one JSON object per line with `{'`, `'.join(fields)}`"
        )
    return questions, answers


def _read_pair(record: Mapping[str, Any], place: str) -> tuple[OfflineAnswer, ...]:
    chosen, rejected = _text(record, "chosen", place), _text(record, "rejected", place)
    if chosen == rejected:
        raise ConfigError(f"{place}: `chosen` and `rejected` are the same text; leave the record out")
    return OfflineAnswer(chosen, 1.0, place), OfflineAnswer(rejected, -1.0, place)


def _read_reward(record: Mapping[str, Any], place: str) -> tuple[OfflineAnswer, ...]:
    reward = record["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ConfigError(f"{place}: `reward`: expected a finite number, got {shorten(reward)}")
    return (OfflineAnswer(_text(record, "response", place), float(reward), place),)


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        kind = "a list of messages" if isinstance(value, list) else shorten(value)
        raise ConfigError(f"{place}: `{name}`: expected text that is not empty, got {kind}")
    check_encodable(value, name, place)
    return value.strip() if name == "prompt" else value


def encode_answers(
    answers: Sequence[Sequence[OfflineAnswer]],
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    template: str,
    limit: int,
) -> list[tuple[tuple[int, ...], ...]]:
    """Return the token ids of every answer, followed by the token that ends a turn (if there is one).

    Raises ConfigError naming the line of an answer that contains a control token, that is longer than the
    model's context of `limit` tokens with its prompt, or that has the tokens of the other answer of its pair.
    """
    end_of_text = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    end = (turn_end_ids(template, tokenizer) or end_of_text)[:1]
    encoded = []
    for record, prompt in zip(answers, prompts, strict=True):
        ids = [(*tokenizer.encode(answer.text, add_special_tokens=False), *end) for answer in record]
        for answer, tokens in zip(record, ids, strict=True):
            found = find_control_tokens([Question(0, answer.text, None)], tokenizer)
            if found:
                raise ConfigError(
                    f"{answer.place}: an answer holds the control token {found[0][1]!r}, which would end or "
                    "forge a turn; remove it"
                )
            if len(prompt) + len(tokens) > limit:
                raise ConfigError(
                    f"{answer.place}: prompt and answer have {len(prompt) + len(tokens)} tokens, the limit is "
                    f"{limit}; shorten the answer or leave the record out"
                )
        if len(set(ids)) < len(ids):
            raise ConfigError(f"{record[0].place}: both answers have the same tokens; leave the record out")
        encoded.append(tuple(ids))
    return encoded
