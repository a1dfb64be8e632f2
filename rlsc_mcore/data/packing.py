"""Pack rollouts into micro-batches of whole sequences; no sequence is cut or dropped."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.types import PackedBatch, Rollout, UniqueSequence


def merge_identical(
    rollouts: Sequence[Rollout],
    *,
    train_end_token: bool,
    train_truncated: bool,
    stop_token_ids: frozenset[int],
    advantages: Sequence[float] | None = None,
) -> list[UniqueSequence]:
    """Merge a step's rollouts into distinct sequences, in order of first appearance, and mark the trained
    tokens.

    Every response token is trained, including the first. The end-of-text token is trained only with
    `train_end_token`, and an answer cut at its length limit only with `train_truncated`. A rollout without
    response tokens is kept, without trained tokens. `advantages`: one per rollout, equal for identical
    answers.
    """
    groups: dict[int, int] = {}
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    first: dict[tuple[int, tuple[int, ...]], Rollout] = {}
    advantage: dict[tuple[int, tuple[int, ...]], float] = {}
    for rollout, value in zip(rollouts, advantages or [0.0] * len(rollouts), strict=True):
        groups.setdefault(rollout.question_index, len(groups))
        key = (rollout.question_index, rollout.response_ids)
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, rollout)
        assert advantage.setdefault(key, value) == value, "identical answers with different advantages"

    return [
        UniqueSequence(
            rollout,
            groups[key[0]],
            counts[key],
            trained_tokens(
                rollout,
                train_end_token=train_end_token,
                train_truncated=train_truncated,
                stop_token_ids=stop_token_ids,
            ),
            advantage[key],
        )
        for key, rollout in first.items()
    ]


def trains_truncated(algorithm: AlgorithmConfig) -> bool:
    """Return whether answers cut at the length limit are trained: `train_truncated`, or its default."""
    if algorithm.train_truncated is not None:
        return algorithm.train_truncated
    return algorithm.objective != "rlsc" or algorithm.confidence not in ("length_normalized", "token")


def trained_tokens(
    rollout: Rollout, *, train_end_token: bool, train_truncated: bool, stop_token_ids: frozenset[int]
) -> tuple[bool, ...]:
    """Mark the response tokens that are trained; see `merge_identical`."""
    if rollout.finish_reason == "length" and not train_truncated:
        return (False,) * len(rollout.response_ids)
    last = len(rollout.response_ids) - 1
    return tuple(
        train_end_token or i < last or token not in stop_token_ids
        for i, token in enumerate(rollout.response_ids)
    )


def pack(
    sequences: Sequence[UniqueSequence], tokens_per_micro_batch: int, *, multiple_of: int = 1
) -> list[PackedBatch]:
    """Pack sequences, longest first, into batches of at most `tokens_per_micro_batch` tokens.

    A longer sequence gets its own batch. Each batch is padded to a multiple of `multiple_of` (the
    tensor-parallel size, for sequence parallelism) with one dummy segment without trained tokens. The result
    depends only on the arguments.
    """
    lengths = [len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in sequences]
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(tokens_per_micro_batch)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return [_with_teacher([(i, sequences[i]) for i in members], multiple_of) for members in bins]


def _with_teacher(members: Sequence[tuple[int, UniqueSequence]], multiple_of: int) -> PackedBatch:
    """Pack sequences, and those that are distilled once more behind their teacher's prompts."""
    batch = _pack_one(members, multiple_of)
    taught = [
        (i, replace(sequence, rollout=replace(sequence.rollout, prompt_ids=sequence.teacher_prompt)))
        for i, sequence in members
        if sequence.teacher_prompt and sequence.advantage > 0 and any(sequence.trained)
    ]
    return replace(batch, teacher=_pack_one(taught, multiple_of)) if taught else batch


def padding_batch(num_tokens: int) -> PackedBatch:
    """Return a batch without trained tokens. A rank that has no sequences runs it so that the other ranks'
    collectives complete."""
    return _pack_one([], num_tokens)


def _pack_one(members: Sequence[tuple[int, UniqueSequence]], multiple_of: int) -> PackedBatch:
    tokens: list[int] = []
    targets: list[int] = []
    mask: list[bool] = []
    engine: list[float] = []
    lengths: list[int] = []
    for _, sequence in members:
        prompt, response = sequence.rollout.prompt_ids, sequence.rollout.response_ids
        whole = (*prompt, *response)
        before = len(prompt) - 1  # positions that predict prompt tokens
        tokens += whole
        targets += (*whole[1:], 0)
        mask += (*(False,) * before, *sequence.trained, False)
        engine += (*(0.0,) * before, *sequence.rollout.engine_log_probs, 0.0)
        lengths.append(len(whole))
    padding = -len(tokens) % multiple_of if members else multiple_of
    if padding:
        tokens += [0] * padding
        targets += [0] * padding
        mask += [False] * padding
        engine += [0.0] * padding
        lengths.append(padding)
    dummy = [-1] if padding else []
    response_mask = torch.tensor(mask, dtype=torch.bool)
    return PackedBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        target_ids=torch.tensor(targets, dtype=torch.int64),
        response_mask=response_mask,
        engine_log_probs=torch.tensor(engine, dtype=torch.float32) * response_mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequence_lengths=tuple(lengths),
        trained_lengths=tuple([sum(s.trained) for _, s in members] + [0] * len(dummy)),
        multiplicity=torch.tensor(
            [s.multiplicity for _, s in members] + [0] * len(dummy), dtype=torch.float64
        ),
        advantages=torch.tensor([s.advantage for _, s in members] + [0.0] * len(dummy), dtype=torch.float64),
        group_ids=torch.tensor([s.group for _, s in members] + dummy, dtype=torch.int64),
        sequence_ids=torch.tensor([i for i, _ in members] + dummy, dtype=torch.int64),
    )
