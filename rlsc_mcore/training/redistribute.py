"""Send rollouts from the engines that sampled them to the ranks that train them, balanced by FLOPs.

Headers of 72 bytes per answer go to all ranks, so that every rank computes the same plan. Tokens and
log-probs are sent once, as int32 and float32, from a rank of the sampling engine to each rank that trains
them. All ranks know all prompts. Text is sent only for objectives with a reward, to the one engine that
rewards all answers of a question.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig, Config, RolloutConfig
from rlsc_mcore.data.balance import CostModel, assign, imbalance, loads
from rlsc_mcore.data.packing import trained_tokens, trains_truncated
from rlsc_mcore.data.questions import Asked
from rlsc_mcore.grading.box_tokens import box_tokens
from rlsc_mcore.grading.rewards import trained_rollouts
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.inputs import RunInputs
from rlsc_mcore.training.teaching import careless_prompts, gather_teaching
from rlsc_mcore.types import Exchange, Question, Rollout, UniqueSequence

MarkTrained = Callable[[Rollout], tuple[bool, ...]]  # which response tokens are trained
# Columns of a header, int64.
PLACE, SAMPLE, QUESTION, LENGTH, TRAINED, TRUNCATED, VERSION, DIGEST, DIGEST_2 = range(9)


@dataclass(frozen=True)
class _Sequence:
    """Describe a distinct answer of the step, from the headers only."""

    engine: int  # the engine that sampled it first
    position: int  # index in that engine's rollouts
    header: Sequence[int]
    multiplicity: int
    advantage: float


@dataclass(frozen=True)
class _Transfer:
    """List the sequences that one rank sends to another, by their numbers in the step, in order."""

    source: int
    target: int
    numbers: tuple[int, ...]


def redistribute_step(
    config: Config, inputs: RunInputs, groups: Groups, step: int, rollouts: Sequence[Rollout]
) -> Exchange:
    """Reward, merge and redistribute the rollouts of the step with index `step`; collective over the
    world."""
    algorithm = config.algorithm
    asked = inputs.sampler.step_questions(step)
    places = {question: place for place, question in enumerate(asked)}
    mark_trained: MarkTrained = partial(
        trained_tokens,
        train_end_token=algorithm.train_end_token,
        train_truncated=trains_truncated(algorithm),
        stop_token_ids=frozenset(inputs.stop_token_ids),
    )
    if OBJECTIVES[algorithm.objective].masks_box:
        mark_trained = _outside_box(mark_trained, partial(inputs.tokenizer.decode, skip_special_tokens=True))
    rewards: Mapping[tuple[int, int], float] | None
    teacher_prompts: Mapping[int, tuple[int, ...]] = {}
    if WeightedObjective(algorithm, 1).distills:
        rewards, teacher_prompts = gather_teaching(config, inputs, groups, rollouts, places)
    elif OBJECTIVES[algorithm.objective].needs_careless:
        teacher_prompts = careless_prompts(config, inputs, {index for index, _ in asked})
        rewards = {
            (place, sample): float(index in teacher_prompts)
            for (index, repeat), place in places.items()
            for sample in range(
                repeat * config.rollout.num_samples, (repeat + 1) * config.rollout.num_samples
            )
        }
    elif inputs.offline:
        rewards = _offline_advantages(inputs, places)
    else:
        rewards = gather_advantages(algorithm, config.rollout, rollouts, places, inputs.questions, groups)
    cost = inputs.architecture.cost_model()
    return redistribute(
        rollouts,
        places,
        config.rollout,
        inputs.prompts,
        mark_trained,
        cost,
        groups,
        rewards,
        teacher_prompts,
        drop_groups=algorithm.drop_groups,
    )


def _outside_box(mark_trained: MarkTrained, decode: Callable[[Sequence[int]], str]) -> MarkTrained:
    """Return `mark_trained` without the tokens inside the last box of the answer."""

    def mark(rollout: Rollout) -> tuple[bool, ...]:
        inside = box_tokens(rollout.response_ids, decode)
        return tuple(is_trained and i not in inside for i, is_trained in enumerate(mark_trained(rollout)))

    return mark


def redistribute(
    rollouts: Sequence[Rollout],
    places: Mapping[Asked, int],
    options: RolloutConfig,
    prompts: Sequence[Sequence[int]],
    mark_trained: MarkTrained,
    cost: CostModel,
    groups: Groups,
    rewards: Mapping[tuple[int, int], float] | None = None,
    teacher_prompts: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
    *,
    drop_groups: bool = False,
) -> Exchange:
    """Merge identical answers and spread the distinct ones over ranks by estimated FLOPs.

    Collective over the world. `rollouts` are those of this rank's engine, equal on all its ranks. `places`
    maps (question, number of earlier occurrences in the step) to the position in the step. `options` says how
    many samples of a question are trained. `prompts` holds the prompt of every question index. `rewards`
    holds the advantage of every trained (position, sample); see `gather_advantages`. `teacher_prompts` holds
    the teacher's or careless prompt of questions, by index. `drop_groups` leaves out questions whose
    advantages are all 0. Sequences are ordered by position and sample. Their questions are numbered over all
    ranks.
    """
    own = _headers(rollouts, places, options.num_samples, mark_trained)
    tables = [table.tolist() for table in groups.gather_tables_over_engines(torch.from_numpy(own))]
    sequences = _merge(tables, options, rewards)
    num_answers = sum(each.multiplicity for each in sequences)
    if drop_groups:
        with_signal = {each.header[QUESTION] for each in sequences if each.advantage}
        sequences = [each for each in sequences if each.header[QUESTION] in with_signal]
    lengths = [len(prompts[each.header[QUESTION]]) + each.header[LENGTH] for each in sequences]
    costs = [
        cost.flops(length, each.header[TRAINED]) for length, each in zip(lengths, sequences, strict=True)
    ]
    owners = [_owner(each.engine, number, groups) for number, each in enumerate(sequences)]
    targets = assign(costs, owners, groups.dp_size)
    received = _send_tokens(rollouts, sequences, targets, prompts, groups)
    question_numbers: dict[int, int] = {}
    for each in sequences:
        question_numbers.setdefault(each.header[QUESTION], len(question_numbers))
    trained = []
    for number, each in enumerate(sequences):
        if targets[number] == groups.dp_rank:
            rollout = received[number] if number in received else rollouts[each.position]
            group = question_numbers[each.header[QUESTION]]
            trained.append(
                UniqueSequence(
                    rollout,
                    group,
                    each.multiplicity,
                    mark_trained(rollout),
                    each.advantage,
                    teacher_prompts.get(each.header[QUESTION], ()),
                )
            )
    return Exchange(
        sequences=trained,
        num_sequences=len(sequences),
        num_distinct=len({(row[QUESTION], row[DIGEST], row[DIGEST_2]) for table in tables for row in table}),
        num_tokens=sum(lengths),
        num_tokens_unmerged=sum(
            length * each.multiplicity for length, each in zip(lengths, sequences, strict=True)
        ),
        num_dropped=num_answers - sum(each.multiplicity for each in sequences),
        moved_share=sum(a != b for a, b in zip(owners, targets, strict=True)) / max(1, len(sequences)),
        imbalance_sampled=imbalance(loads(costs, owners, groups.dp_size)),
        imbalance=imbalance(loads(costs, targets, groups.dp_size)),
        engine_imbalance=imbalance([float(sum(row[LENGTH] for row in table)) for table in tables]),
    )


def gather_advantages(
    algorithm: AlgorithmConfig,
    options: RolloutConfig,
    rollouts: Sequence[Rollout],
    places: Mapping[Asked, int],
    questions: Sequence[Question],
    groups: Groups,
) -> dict[tuple[int, int], float] | None:
    """Reward the step's answers; collective over `engines_group`.

    Returns None if the objective has no reward. Engine `question % num_engines` rewards all answers of a
    question together; the other engines send it their text. Returns the advantage of every trained answer, by
    (position in the step, sample).
    """
    if OBJECTIVES[algorithm.objective].reward is None:
        return None
    parts: list[list[tuple[int, Rollout]]] = [[] for _ in range(groups.num_engines)]
    shortened: dict[str, Any] = {} if algorithm.overlong_tokens else {"response_ids": ()}  # its length counts
    for rollout in rollouts:
        place = places[rollout.question_index, rollout.sample_index // options.num_samples]
        parts[rollout.question_index % groups.num_engines].append(
            (place, replace(rollout, prompt_ids=(), engine_log_probs=(), **shortened))
        )
    mine = sorted(
        (item for part in groups.exchange_objects_over_engines(parts) for item in part),
        key=lambda item: (item[0], item[1].sample_index),
    )
    graded = trained_rollouts(algorithm, options, [rollout for _, rollout in mine], questions)
    table = torch.tensor(
        [
            [
                float(places[rollout.question_index, rollout.sample_index // options.num_samples]),
                float(rollout.sample_index),
                value,
            ]
            for rollout, value in graded
        ],
        dtype=torch.float64,
    ).reshape(-1, 3)
    rows = torch.cat(groups.gather_tables_over_engines(table)).tolist()
    return {(int(place), int(sample)): value for place, sample, value in rows}


def _offline_advantages(inputs: RunInputs, places: Mapping[Asked, int]) -> dict[tuple[int, int], float]:
    """Return the advantages that the file gives to the step's answers, by (position in the step, sample)."""
    advantages = {}
    for (index, repeat), place in places.items():
        record = inputs.offline[index]
        for position, answer in enumerate(record):
            advantages[place, repeat * len(record) + position] = answer.advantage
    return advantages


def _headers(
    rollouts: Sequence[Rollout], places: Mapping[Asked, int], num_samples: int, mark_trained: MarkTrained
) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Describe this engine's answers as headers: int64 [answers, 9]."""
    table = np.zeros((len(rollouts), DIGEST_2 + 1), dtype=np.int64)
    for row, rollout in zip(table, rollouts, strict=True):
        tokens = np.asarray(rollout.response_ids, dtype=np.int32)
        row[PLACE] = places[rollout.question_index, rollout.sample_index // num_samples]
        row[SAMPLE], row[QUESTION], row[LENGTH] = rollout.sample_index, rollout.question_index, len(tokens)
        row[TRAINED], row[TRUNCATED] = sum(mark_trained(rollout)), rollout.finish_reason == "length"
        row[VERSION] = rollout.policy_version
        row[DIGEST:] = np.frombuffer(hashlib.sha256(tokens.tobytes()).digest()[:16], dtype=np.int64)
    return table


def _merge(
    tables: Sequence[Sequence[Sequence[int]]],
    options: RolloutConfig,
    rewards: Mapping[tuple[int, int], float] | None,
) -> list[_Sequence]:
    """Merge identical trained answers to one question into the first by position and sample."""
    num_trained = options.num_trained or options.num_samples
    answers = [
        (row, engine, position)
        for engine, table in enumerate(tables)
        for position, row in enumerate(table)
        if row[SAMPLE] % options.num_samples < num_trained
    ]
    answers.sort(key=lambda answer: (answer[0][PLACE], answer[0][SAMPLE]))
    merged: dict[tuple[int, int, int], list[tuple[Sequence[int], int, int]]] = {}
    for answer in answers:
        row = answer[0]
        merged.setdefault((row[QUESTION], row[DIGEST], row[DIGEST_2]), []).append(answer)
    sequences = []
    for same in merged.values():
        values = {0.0 if rewards is None else rewards[row[PLACE], row[SAMPLE]] for row, _, _ in same}
        assert len(values) == 1, "identical answers with different advantages"
        row, engine, position = same[0]
        sequences.append(_Sequence(engine, position, row, len(same), values.pop()))
    return sequences


def _owner(engine: int, number: int, groups: Groups) -> int:
    """Return a data-parallel rank whose trainer ranks include ranks of the engine.

    If the engine spans several data-parallel ranks, its sequences alternate between them by `number`.
    """
    first = engine * groups.engine_tp_size % (groups.world_size // groups.pp_size) // groups.tp_size
    return (first + number % max(1, groups.engine_tp_size // groups.tp_size)) % groups.dp_size


def _transfers(sequences: Sequence[_Sequence], targets: Sequence[int], groups: Groups) -> list[_Transfer]:
    """List the transfers that this rank sends or receives, by source and target.

    A rank of the sampling engine keeps the sequences that it trains. Any other target receives each sequence
    from one source; the engine's ranks alternate as sources.
    """
    size = groups.engine_tp_size
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, (each, dp_rank) in enumerate(zip(sequences, targets, strict=True)):
        if groups.engine_index != each.engine and dp_rank != groups.dp_rank:
            continue
        for member, target in enumerate(groups.model_ranks(dp_rank)):
            source = each.engine * size + member % size
            if target // size != each.engine and groups.rank in (source, target):
                numbers.setdefault((source, target), []).append(number)
    return [_Transfer(source, target, tuple(which)) for (source, target), which in numbers.items()]


def _send_tokens(
    rollouts: Sequence[Rollout],
    sequences: Sequence[_Sequence],
    targets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    groups: Groups,
) -> dict[int, Rollout]:
    """Send tokens and log-probs to the ranks that train them; collective over the world.

    Returns the received rollouts, without text, by their number in the step.
    """
    if groups.world_size == groups.engine_tp_size:  # one engine: every rank has all answers
        return {}
    outgoing: list[list[np.ndarray]] = [[] for _ in range(groups.world_size)]
    incoming: list[tuple[int, ...]] = [() for _ in range(groups.world_size)]
    for transfer in _transfers(sequences, targets, groups):
        if transfer.target == groups.rank:
            incoming[transfer.source] = transfer.numbers
            continue
        for number in transfer.numbers:
            rollout = rollouts[sequences[number].position]
            outgoing[transfer.target].append(np.asarray(rollout.response_ids, dtype=np.int32))
            outgoing[transfer.target].append(
                np.asarray(rollout.engine_log_probs, dtype=np.float32).view(np.int32)
            )
    empty = np.zeros(0, dtype=np.int32)
    parts = [torch.from_numpy(np.concatenate([empty, *arrays])) for arrays in outgoing]
    sizes = [sum(2 * sequences[number].header[LENGTH] for number in numbers) for numbers in incoming]
    received = {}
    for numbers, part in zip(incoming, groups.exchange_over_world(parts, sizes), strict=True):
        values, start = part.numpy(), 0
        for number in numbers:
            header = sequences[number].header
            middle, end = start + header[LENGTH], start + 2 * header[LENGTH]
            received[number] = Rollout(
                question_index=header[QUESTION],
                sample_index=header[SAMPLE],
                prompt_ids=tuple(prompts[header[QUESTION]]),
                response_ids=tuple(values[start:middle].tolist()),
                engine_log_probs=tuple(values[middle:end].view(np.float32).tolist()),
                finish_reason="length" if header[TRUNCATED] else "stop",
                policy_version=header[VERSION],
            )
            start = end
    return received
