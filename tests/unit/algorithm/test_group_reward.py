"""The clipped group-relative loss against autograd of the published loss, and advantages and rewards by
hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig, ConfigError, RolloutConfig
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.grading.rewards import frequency_rewards, group_advantages, trained_rollouts
from rlsc_mcore.types import Question, Rollout

LENGTHS = [3, 1, 4]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def published_loss(
    current: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, options: dict[str, float]
) -> torch.Tensor:
    """PPO's clipped surrogate and the k3 estimator, token by token, in float64 (arXiv 2402.03300, equation 3;
    summed)."""
    advantage_T = advantages.repeat_interleave(torch.tensor(LENGTHS))
    ratio = (current - old).exp()
    clipped = ratio.clamp(1 - options["clip_low"], 1 + options["clip_high"])
    k3 = (old - current).exp() - (old - current) - 1
    return (-torch.minimum(ratio * advantage_T, clipped * advantage_T) + options["kl"] * k3).sum()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clip_low=st.sampled_from([0.1, 0.2, 1.0]),
    clip_high=st.sampled_from([0.2, 0.28]),
    kl=st.sampled_from([0.0, 0.04]),
)
def test_coefficients_are_the_gradient_of_the_published_loss(
    seed: int, clip_low: float, clip_high: float, kl: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(8, generator=generator) * 3
    current = old + torch.randn(8, generator=generator) * 0.3
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)
    options = {"clip_low": clip_low, "clip_high": clip_high, "kl": kl}
    made = WeightedObjective(AlgorithmConfig(objective="grpo", reduction="sum", **options), 3)  # type: ignore[arg-type]
    ones = torch.ones(3, dtype=torch.float64)
    mask = torch.ones(8, dtype=torch.bool)
    found = made.token_coefficients(old, mask, CU_SEQLENS, ones, None, advantages, current)
    variable = current.double().requires_grad_()
    published_loss(variable, old.double(), advantages, options).backward()
    assert variable.grad is not None
    torch.testing.assert_close(found.double(), -variable.grad, rtol=1e-5, atol=1e-6)


def test_the_first_update_is_the_policy_gradient() -> None:
    made = WeightedObjective(AlgorithmConfig(objective="grpo", reduction="sum", kl=0.1), 3)
    advantages = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    arguments: Any = (
        torch.full((8,), -1.0),
        torch.ones(8, dtype=torch.bool),
        CU_SEQLENS,
        torch.ones(3).double(),
        None,
        advantages,
    )
    first, later = made.token_coefficients(*arguments), made.token_coefficients(*arguments, arguments[0])
    assert first.tolist() == later.tolist() == [0.5] * 3 + [-1.0] + [0.0] * 4


def test_standardized_advantages() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1]
    found = group_advantages(rewards, groups, standardize=True)
    deviation = float(np.std(rewards[:4], ddof=1))
    assert found == pytest.approx(
        [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation, 0, 0]
    )
    counted = group_advantages(rewards[:4], groups[:4], standardize=True, counted=[True, True, False, False])
    assert counted[:2] == pytest.approx([0.5 / math.sqrt(0.5), -0.5 / math.sqrt(0.5)])


def test_answer_frequencies() -> None:
    responses = ["\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{3}", "no box"]
    assert frequency_rewards(responses) == [0.5, 0.5, 0.25, 0.0]


def test_all_samples_vote_and_the_first_are_trained() -> None:
    answers = [1, 2, 1, 2, 2, 2]  # the first two alone would be a tie, won by 1
    rollouts = [
        Rollout(0, i, (1,), (i + 2,), (-1.0,), "stop", 0, text=f"\\boxed{{{answer}}}")
        for i, answer in enumerate(answers)
    ]
    options = RolloutConfig(num_samples=6, num_trained=2)
    trained = trained_rollouts(
        AlgorithmConfig(objective="majority_vote"), options, rollouts, [Question(0, "?", None)]
    )
    assert [(rollout.sample_index, advantage) for rollout, advantage in trained] == [(0, -0.5), (1, 0.5)]
    plain = trained_rollouts(AlgorithmConfig(), options, rollouts, [])
    assert [rollout.sample_index for rollout, _ in plain] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rollout.num-samples", "4", "--rollout.num-trained", "5"], "rollout.num_trained"),
        (
            ["--algorithm.objective", "entropy", "--training.updates-per-rollout", "2"],
            "training.updates_per_rollout",
        ),
        (["--algorithm.clip-low", "0"], "algorithm.clip_low"),
        (["--algorithm.kl", "-1"], "algorithm.kl"),
        (
            ["--algorithm.objective", "rent", "--rollout.num-samples", "1"],
            "rollout.num_samples: .* at least 2",
        ),
        (
            ["--algorithm.objective", "grpo", "--rollout.num-trained", "1"],
            "rollout.num_trained: .* at least 2 .* grpo",
        ),
    ],
)
def test_refused(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(["--run-dir", "run", "--model.path", "model", "--data.path", "data", *flags])


def test_the_ttrl_preset_is_its_authors_recipe() -> None:
    config = parse_config(
        ["--run-dir", "run", "--model.path", "m", "--data.path", "d", "--algorithm.objective", "ttrl"]
    )
    assert (config.rollout.num_samples, config.rollout.num_trained, config.rollout.temperature) == (
        64,
        32,
        1.0,
    )
    assert config.algorithm.advantage == "standardized" and config.algorithm.rewards == "any"
