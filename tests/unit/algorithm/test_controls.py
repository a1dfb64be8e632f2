"""Control objectives: the same weights in another order, and rewards that know nothing of the right
answer."""

import math
import re

import pytest
import torch

from rlsc_mcore.algorithm.shuffled import ShuffledConfidence
from rlsc_mcore.commands.compare import DEFAULT_OBJECTIVES
from rlsc_mcore.config import AlgorithmConfig, ConfigError
from rlsc_mcore.grading.control_rewards import format_rewards, random_rewards
from rlsc_mcore.objectives import OBJECTIVES
from tests.helpers.group_samples import group_samples

CONTROLS = ["rlsc_shuffled", "format", "random"]


def deal(log_probs: list[float], counts: list[float], groups: list[int]) -> list[float]:
    rule = ShuffledConfidence(AlgorithmConfig(objective="rlsc_shuffled"))
    samples = group_samples(log_probs, counts, groups)
    return rule.group_values(samples).tolist()


def test_the_weights_of_a_question_stay_and_go_to_other_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (-5 * torch.rand(24, generator=generator, dtype=torch.float64)).tolist()
    groups = [position % 3 for position in range(24)]
    dealt = deal(log_probs, [1.0] * 24, groups)
    for group in range(3):
        places = [position for position in range(24) if groups[position] == group]
        assert sorted(dealt[place] for place in places) == pytest.approx(
            sorted(log_probs[place] for place in places)
        )
    assert sum(new != pytest.approx(old) for new, old in zip(dealt, log_probs, strict=True)) > 12


def test_a_sequence_that_was_sampled_k_times_gets_k_weights() -> None:
    log_probs, counts = [-1.0, -2.0, -700.0], [3.0, 2.0, 1.0]
    dealt = deal(log_probs, counts, [0, 0, 0])
    total = sum(count * math.exp(value) for count, value in zip(counts, dealt, strict=True))
    assert total == pytest.approx(3 * math.exp(-1) + 2 * math.exp(-2) + math.exp(-700))


def test_the_order_in_which_ranks_hold_the_samples_is_no_matter() -> None:
    log_probs, counts, groups = [-0.5, -1.5, -2.5, -3.5, -0.1], [1.0, 2.0, 1.0, 1.0, 4.0], [0, 0, 0, 1, 1]
    expected = dict(zip(log_probs, deal(log_probs, counts, groups), strict=True))
    order = [4, 2, 0, 3, 1]
    again = deal([log_probs[i] for i in order], [counts[i] for i in order], [groups[i] for i in order])
    assert again == pytest.approx([expected[log_probs[i]] for i in order])


def test_padding_gets_nothing() -> None:
    assert deal([0.0, -1.0], [0.0, 1.0], [-1, 0]) == pytest.approx([0.0, -1.0])


def test_only_whole_sequences_are_dealt() -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape("algorithm.confidence: expected sequence with algorithm.objective rlsc_shuffled"),
    ):
        AlgorithmConfig(objective="rlsc_shuffled", confidence="token")


def test_a_box_earns_whatever_it_holds() -> None:
    assert format_rewards(["\\boxed{}", "so \\boxed{7}", "7", "\\boxed{7"]) in (
        [1.0, 1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
    )


def test_a_coin_is_fair_repeatable_and_the_same_for_equal_answers() -> None:
    responses = [f"answer {number}" for number in range(2000)]
    rewards = random_rewards(responses)
    assert set(rewards) == {0.0, 1.0} and 0.46 < sum(rewards) / 2000 < 0.54  # 3.6 standard errors
    assert random_rewards(responses) == rewards and random_rewards(list(reversed(responses))) == list(
        reversed(rewards)
    )
    first, second, third = random_rewards(["a", "b", "a"])
    assert first == third and second in (0.0, 1.0)
    # The same answer among others: another coin.
    coins = [random_rewards(["a", f"other {number}"])[0] for number in range(200)]
    assert 60 < sum(coins) < 140


def test_controls_are_trained_only_where_they_are_named() -> None:
    assert [row.name for row in OBJECTIVES.values() if row.is_control] == CONTROLS
    assert not set(CONTROLS) & set(DEFAULT_OBJECTIVES)
