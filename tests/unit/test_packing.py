"""Packing: no token lost, none cut, the mask exact to the token, every rollout counted once."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.data.packing import merge_identical, pack
from rlsc_mcore.types import PackedBatch, Rollout

EOS = 0
TOKENS = st.integers(1, 5)  # few values, so that answers repeat


@st.composite
def rollout_lists(draw: st.DrawFn) -> list[Rollout]:
    """Questions with their own prompts and several answers; the same question may be asked twice in a
    step."""
    prompts = draw(
        st.dictionaries(st.integers(0, 9), st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=4)
    )
    rollouts = []
    for question, prompt in prompts.items():
        for sample in range(draw(st.integers(1, 5))):
            body = draw(st.lists(TOKENS, max_size=7))
            ended = draw(st.booleans())
            response = (*body, EOS) if ended else tuple(body)
            rollouts.append(
                Rollout(
                    question_index=question,
                    sample_index=sample,
                    prompt_ids=tuple(prompt),
                    response_ids=response,
                    engine_log_probs=tuple(-0.125 * (1 + i + sum(response)) for i in range(len(response))),
                    finish_reason="stop" if ended else "length",
                    policy_version=0,
                )
            )
    return rollouts


def packed(
    rollouts: list[Rollout],
    budget: int,
    multiple_of: int,
    *,
    train_end_token: bool = True,
    train_truncated: bool = True,
) -> list[PackedBatch]:
    sequences = merge_identical(
        rollouts,
        train_end_token=train_end_token,
        train_truncated=train_truncated,
        stop_token_ids=frozenset({EOS}),
    )
    return pack(sequences, budget, multiple_of=multiple_of)


def segments(batch: PackedBatch) -> list[dict[str, torch.Tensor]]:
    """The batch cut at cu_seqlens, padding left out."""
    found = []
    for index in range(len(batch.cu_seqlens) - 1):
        start, stop = batch.cu_seqlens[index : index + 2].tolist()
        if batch.group_ids[index] >= 0:
            names = ("token_ids", "target_ids", "response_mask", "engine_log_probs")
            found.append(
                {name: getattr(batch, name)[start:stop] for name in names} | {"index": torch.tensor(index)}
            )
    return found


@settings(max_examples=80, deadline=None)
@given(
    rollouts=rollout_lists(),
    budget=st.integers(1, 40),
    multiple_of=st.sampled_from([1, 2, 4, 8]),
    train_end_token=st.booleans(),
    train_truncated=st.booleans(),
)
def test_every_rollout_is_there_whole_and_masked_to_the_token(
    rollouts: list[Rollout], budget: int, multiple_of: int, train_end_token: bool, train_truncated: bool
) -> None:
    batches = packed(
        rollouts, budget, multiple_of, train_end_token=train_end_token, train_truncated=train_truncated
    )
    counted: Counter[tuple[int, ...]] = Counter()
    prompts = {rollout.question_index: rollout.prompt_ids for rollout in rollouts}
    first_seen = list(dict.fromkeys(rollout.question_index for rollout in rollouts))
    by_answer = {(rollout.question_index, rollout.response_ids): rollout for rollout in rollouts}
    for batch in batches:
        for segment in segments(batch):
            index = int(segment["index"])
            question = first_seen[int(batch.group_ids[index])]
            prompt = prompts[question]
            tokens = tuple(segment["token_ids"].tolist())
            assert tokens[: len(prompt)] == prompt
            response = tokens[len(prompt) :]
            counted[(question, *response)] += int(batch.multiplicity[index])
            rollout = by_answer[question, response]
            # Position t predicts token t + 1: the logit of the first answer token stands at prompt_length -
            # 1.
            assert segment["target_ids"][:-1].tolist() == list(tokens[1:])
            expected = [False] * len(tokens)
            for position, token in enumerate(response):
                is_end = position == len(response) - 1 and token == EOS
                cut = rollout.finish_reason == "length"
                expected[len(prompt) - 1 + position] = (train_end_token or not is_end) and (
                    train_truncated or not cut
                )
            assert segment["response_mask"].tolist() == expected
            assert batch.trained_lengths[index] == sum(expected)
            engine = segment["engine_log_probs"]
            for position, value in enumerate(rollout.engine_log_probs):
                slot = len(prompt) - 1 + position
                assert engine[slot] == (value if expected[slot] else 0.0)
            assert torch.count_nonzero(engine) == sum(expected)
    assert counted == Counter((rollout.question_index, *rollout.response_ids) for rollout in rollouts)


@settings(max_examples=80, deadline=None)
@given(rollouts=rollout_lists(), budget=st.integers(1, 40), multiple_of=st.sampled_from([1, 2, 4, 8]))
def test_bins_keep_the_budget_and_padding_trains_nothing(
    rollouts: list[Rollout], budget: int, multiple_of: int
) -> None:
    batches = packed(rollouts, budget, multiple_of)
    ids = []
    for batch in batches:
        total = len(batch.token_ids)
        real = [
            length
            for length, group in zip(batch.sequence_lengths, batch.group_ids.tolist(), strict=True)
            if group >= 0
        ]
        assert sum(real) <= budget or len(real) == 1
        assert total % multiple_of == 0 and total - sum(real) < multiple_of
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist()[-1] == total
        assert batch.cu_seqlens.diff().tolist() == list(batch.sequence_lengths)
        assert batch.max_seqlen == max(batch.sequence_lengths)
        padding = batch.group_ids < 0
        assert padding.sum() == (total > sum(real))
        assert (batch.multiplicity[padding] == 0).all() and (batch.sequence_ids[padding] == -1).all()
        if total > sum(real):
            start = sum(real)
            assert not batch.response_mask[start:].any() and batch.trained_lengths[-1] == 0
        assert not batch.engine_log_probs[~batch.response_mask].any()
        ids += batch.sequence_ids[~padding].tolist()
    assert sorted(ids) == list(range(len({(r.question_index, r.response_ids) for r in rollouts})))


@settings(max_examples=20, deadline=None)
@given(rollouts=rollout_lists(), budget=st.integers(1, 40))
def test_packing_is_a_function_of_its_input(rollouts: list[Rollout], budget: int) -> None:
    once, again = packed(rollouts, budget, 2), packed(list(rollouts), budget, 2)
    assert len(once) == len(again)
    for left, right in zip(once, again, strict=True):
        for name, value in vars(left).items():
            other = getattr(right, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def make(
    prompt: tuple[int, ...], response: tuple[int, ...], *, question: int = 0, reason: str = "stop"
) -> Rollout:
    return Rollout(
        question_index=question,
        sample_index=0,
        prompt_ids=prompt,
        response_ids=response,
        engine_log_probs=(-1.0,) * len(response),
        finish_reason=reason,  # type: ignore[arg-type]
        policy_version=0,
    )


def test_one_sequence_written_out() -> None:
    (batch,) = packed([make((7, 8, 9), (4, 5, EOS))], 100, 4)
    assert batch.token_ids.tolist() == [7, 8, 9, 4, 5, EOS, 0, 0]
    assert batch.target_ids.tolist() == [8, 9, 4, 5, EOS, 0, 0, 0]
    assert batch.response_mask.tolist() == [False, False, True, True, True, False, False, False]
    assert batch.engine_log_probs.tolist() == [0, 0, -1, -1, -1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 6, 8]
    assert (batch.multiplicity.tolist(), batch.group_ids.tolist(), batch.sequence_ids.tolist()) == (
        [1, 0],
        [0, -1],
        [0, -1],
    )
    assert batch.trained_lengths == (3, 0)


@pytest.mark.parametrize(
    ("rollout", "train_end_token", "train_truncated", "trained"),
    [
        (make((7,), (4, EOS)), True, True, [True, True]),
        (make((7,), (4, EOS)), False, True, [True, False]),
        (make((7,), (EOS, 4, EOS)), False, True, [True, True, False]),  # only the last one ends the answer
        (
            make((7,), (4, 5), reason="length"),
            False,
            True,
            [True, True],
        ),  # no end token: nothing to leave out
        (make((7,), (4, 5), reason="length"), True, False, [False, False]),
        (make((7,), (EOS,)), False, True, [False]),
    ],
)
def test_settings_of_the_mask(
    rollout: Rollout, train_end_token: bool, train_truncated: bool, trained: list[bool]
) -> None:
    (batch,) = packed([rollout], 100, 1, train_end_token=train_end_token, train_truncated=train_truncated)
    assert batch.response_mask.tolist() == [*trained, False]


def test_equal_answers_to_different_questions_stay_apart() -> None:
    (batch,) = packed([make((7,), (4,)), make((7,), (4,), question=3), make((7,), (4,))], 100, 1)
    assert batch.multiplicity.tolist() == [2, 1] and batch.group_ids.tolist() == [0, 1]


def test_a_sequence_longer_than_the_budget_is_not_cut() -> None:
    batches = packed([make((7,), tuple(range(1, 60))), make((7,), (4,))], 8, 1)
    assert sorted(batch.sequence_lengths for batch in batches) == [(2,), (60,)]


def test_nothing_to_pack_is_no_batch() -> None:
    assert packed([], 8, 2) == []
