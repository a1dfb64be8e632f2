"""Rollouts change ranks before they are trained: every data-parallel rank gets equal FLOPs, whatever it sampled."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlsc_mcore.data.balance import CostModel, assign, imbalance, loads
from rlsc_mcore.data.packing import UniqueSequence
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.types import Rollout

Asked = tuple[int, int]  # question index, how often it was asked before within the step
_Key = tuple[int, bytes]  # question, digest of the answer's tokens


@dataclass(frozen=True)
class Exchange:
    """What this rank trains, and what the exchange was worth."""

    sequences: list[UniqueSequence]
    num_sequences: int  # distinct sequences of the step, over all ranks
    num_tokens: int  # their tokens, prompts included
    num_tokens_unmerged: int  # tokens there would be without merging identical answers
    moved_share: float  # of the distinct sequences
    imbalance_sampled: float  # largest rank's FLOPs / mean - 1, had every rank trained what it sampled
    imbalance: float  # the same, as trained


@dataclass(frozen=True)
class _Header:
    key: _Key
    num_tokens: int
    num_trained: int
    multiplicity: int


def gather_rollouts(
    rollouts: Sequence[Rollout], positions: Mapping[Asked, int], num_samples: int, groups: Groups
) -> tuple[list[Rollout], float]:
    """Turn what this rank's engine sampled into what its trainer group holds; collective over the ranks of one place per engine.

    `positions` gives the place in the step of every (question, how often it was asked before within the step). Every trainer
    group gets all samples of every so manieth place, in the order that was asked. Returns them with the engines' imbalance:
    the tokens of the engine that sampled most / mean - 1.
    """
    parts = groups.gather_objects_over_engines(list(rollouts))
    tokens = [float(sum(len(rollout.response_ids) for rollout in part)) for part in parts]
    placed = [(positions[r.question_index, r.sample_index // num_samples], r.sample_index, r) for part in parts for r in part]
    mine = sorted((item for item in placed if item[0] % groups.dp_size == groups.dp_rank), key=lambda item: item[:2])
    return [rollout for _, _, rollout in mine], imbalance(tokens)


def redistribute_sequences(sequences: Sequence[UniqueSequence], cost: CostModel, groups: Groups) -> Exchange:
    """Spread the step's distinct sequences over the data-parallel ranks by estimated FLOPs; collective over that group.

    Only lengths and digests travel to every rank, and the tokens of those that move. Questions are numbered over all ranks, so
    that `group` means the same everywhere, and a question asked on several ranks is one question. The sequences' sum of
    gradients does not change.
    """
    headers = [_Header(_key(s), len(s.rollout.prompt_ids) + len(s.rollout.response_ids), sum(s.trained), s.multiplicity) for s in sequences]
    by_rank = groups.gather_objects_over_dp(headers)
    merged: dict[_Key, _Header] = {}
    owners: dict[_Key, int] = {}
    questions: dict[int, int] = {}
    for rank, theirs in enumerate(by_rank):
        for header in theirs:
            earlier = merged.get(header.key)
            total = header.multiplicity + (0 if earlier is None else earlier.multiplicity)
            merged[header.key] = replace(header, multiplicity=total)
            owners.setdefault(header.key, rank)
            questions.setdefault(header.key[0], len(questions))
    keys = list(merged)
    costs = [cost.flops(header.num_tokens, header.num_trained) for header in merged.values()]
    owner = [owners[key] for key in keys]
    target = assign(costs, owner, groups.dp_size)
    mine = {key: s for key, s in zip((header.key for header in headers), sequences, strict=True) if owners[key] == groups.dp_rank}
    leaving = {key: mine[key] for key, rank in zip(keys, target, strict=True) if key in mine and rank != groups.dp_rank}
    for arriving in groups.gather_objects_over_dp(leaving):
        mine.update(arriving)
    trained = [
        replace(mine[key], group=questions[key[0]], multiplicity=merged[key].multiplicity)
        for key, rank in zip(keys, target, strict=True)
        if rank == groups.dp_rank
    ]
    return Exchange(
        sequences=trained,
        num_sequences=len(keys),
        num_tokens=sum(header.num_tokens for header in merged.values()),
        num_tokens_unmerged=sum(header.num_tokens * header.multiplicity for header in merged.values()),
        moved_share=sum(a != b for a, b in zip(owner, target, strict=True)) / max(1, len(keys)),
        imbalance_sampled=imbalance(loads(costs, owner, groups.dp_size)),
        imbalance=imbalance(loads(costs, target, groups.dp_size)),
    )


def _key(sequence: UniqueSequence) -> _Key:
    tokens = array("q", sequence.rollout.response_ids).tobytes()
    return sequence.rollout.question_index, hashlib.sha256(tokens).digest()
