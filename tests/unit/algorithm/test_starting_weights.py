"""Losses that compare with the starting weights: coefficients against autograd of the published loss, a step
in several layouts against transformers in float64, and rewards that fall for long answers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig, ConfigError
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.grading.rewards import group_advantages, overlong_penalty
from rlsc_mcore.types import Rollout
from tests.helpers.ranks import run_ranks

LENGTHS = [3, 1, 4]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
MASK = torch.ones(sum(LENGTHS), dtype=torch.bool)
ONES = torch.ones(len(LENGTHS), dtype=torch.float64)


def log_probs(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-2 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) for _ in range(count)]


def coefficients(algorithm: AlgorithmConfig, old: torch.Tensor, *values: torch.Tensor | None) -> torch.Tensor:
    objective = WeightedObjective(algorithm, 1)
    return objective.token_coefficients(old.float(), MASK, CU_SEQLENS, ONES, None, *values)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kl=st.sampled_from([0.0, 0.1]), is_later=st.booleans())
def test_a_penalty_for_the_distance_from_the_start(seed: int, kl: float, is_later: bool) -> None:
    old, current, start = log_probs(seed, 3)
    current = (current if is_later else old).clone().requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    algorithm = AlgorithmConfig(objective="grpo", kl_start=0.3, kl=kl)
    found = coefficients(
        algorithm, old, advantages, current.detach().float() if is_later else None, start.float()
    )
    advantage_T = advantages.repeat_interleave(torch.tensor(LENGTHS))
    ratio = (current - old).exp()
    surrogate = torch.minimum(ratio * advantage_T, ratio.clamp(0.8, 1.2) * advantage_T)
    k3_old = (old - current).exp() - (old - current) - 1
    k3_start = (start - current).exp() - (start - current) - 1
    (-surrogate + kl * k3_old + 0.3 * k3_start).sum().backward()
    torch.testing.assert_close(-found.double(), current.grad, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), is_later=st.booleans())
def test_nsd_has_the_gradient_of_its_published_loss(seed: int, is_later: bool) -> None:
    old, current, start, careless = log_probs(seed, 4)
    current = (current if is_later else old).clone().requires_grad_()
    trained = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    algorithm = AlgorithmConfig(objective="nsd", nsd_kl=0.2)
    now = current.detach().float() if is_later else None
    found = coefficients(algorithm, old, trained, now, start.float(), careless.float())
    p, p0, p_careless = current.exp(), start.exp(), careless.exp()
    gap = (p_careless - p0).clamp(min=0.0)
    loss = gap / (2 - p) + 0.2 * p0 * (start - current)
    (loss * trained.repeat_interleave(torch.tensor(LENGTHS))).sum().backward()
    torch.testing.assert_close(-found.double(), current.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "reason", "expected"),
    [
        (10, "stop", 0),
        (60, "stop", 0),
        (70, "stop", -0.25),
        (80, "stop", -0.5),
        (100, "stop", -1),
        (100, "length", -1),
    ],
)
def test_the_penalty_of_long_answers(length: int, reason: Any, expected: float) -> None:
    rollout = Rollout(0, 0, (1,), (1,) * length, (0.0,) * length, reason, 0)
    assert overlong_penalty(rollout, 100, 40) == expected


@given(reward=st.floats(-3, 3), count=st.integers(2, 9))
def test_equal_rewards_have_no_advantage(reward: float, count: int) -> None:
    """Also where their mean differs in the last bit: 3 x 0.1."""
    assert group_advantages([reward] * count, [7] * count, standardize=True) == [0.0] * count


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--algorithm.kl-start", "0.1"], "algorithm.kl_start"),
        (["--algorithm.overlong-tokens", "8"], "algorithm.overlong_tokens"),
        (["--algorithm.drop-groups", "True"], "algorithm.drop_groups"),
        (
            ["--algorithm.objective", "empo", "--algorithm.overlong-tokens", "99999"],
            "algorithm.overlong_tokens",
        ),
        (["--algorithm.objective", "nsd", "--algorithm.careless-prompt", "x"], "algorithm.careless_prompt"),
        (
            ["--algorithm.objective", "nsd", "--training.updates-per-rollout", "2"],
            "training.updates_per_rollout",
        ),
        (["--algorithm.objective", "dpo", "--algorithm.kl-start", "0.1"], "algorithm.kl_start"),
    ],
)
def test_refused(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(["--run-dir", "run", "--model.path", "model", "--data.path", "data", *flags])


# ---------------------------------------------------------------- a step of the trainer


def pulled_back(folder: str, other: str, tp: int, pp: int, flags: list[str]) -> dict[str, Any]:
    """Start at `folder`, move to the weights of `other`, and train one step without any advantage: what the
    KL term alone does."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from tests.helpers.tiny import make_moved_trainer, make_rollouts

    options = ["--algorithm.objective", "empo", "--algorithm.kl-start", "0.5", "--optimizer.lr", "1e-4"]
    trainer = make_moved_trainer(folder, other, [*options, *flags], tp=tp, pp=pp)
    groups = trainer.groups
    addresses = [weight.parameter.data_ptr() for weight in trainer.policy.weights]
    rollouts = make_rollouts(num_questions=3, num_samples=2)
    sequences = merge_identical(
        rollouts,
        train_end_token=True,
        train_truncated=True,
        stop_token_ids=frozenset({0}),
        advantages=[0.0] * len(rollouts),
    )
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], 96, multiple_of=groups.tp_size)
    outcomes = [trainer.step(batches, step, len(rollouts)) for step in range(2)]
    kl = [float((o.scores.start_kl_sums * o.scores.multiplicity).sum()) for o in outcomes]
    return {
        "kl": kl,
        "log_probs": [float(o.scores.log_probs.sum()) for o in outcomes],
        "grad_norms": [o.grad_norm for o in outcomes],
        "moved": addresses != [weight.parameter.data_ptr() for weight in trainer.policy.weights],
    }


def plain_kl(folder: Path, other: Path) -> float:
    """The sum of k3 over the trained tokens of all rollouts, by transformers in float64."""
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import AutoModelForCausalLM

    from tests.helpers.tiny import make_rollouts, tiny_config

    temperature = tiny_config(str(folder), []).rollout.temperature
    total = 0.0
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (other, folder)
    ]
    for rollout in make_rollouts(num_questions=3, num_samples=2):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        start = len(rollout.prompt_ids)
        scored = []
        for model in models:
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : -1] / temperature
            scored.append(logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0])
        ratio = scored[1] - scored[0]
        total += float((ratio.exp() - 1 - ratio).sum())
    return total


@pytest.mark.distributed
def test_a_step_pulls_the_policy_back_to_its_start(tmp_path: Path) -> None:
    from tests.helpers.tiny import make_model_folder

    folder, other = (make_model_folder(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    (whole,) = run_ranks(1, pulled_back, str(folder), str(other), 1, 1, [])
    assert math.isclose(whole["kl"][0], plain_kl(folder, other), rel_tol=1e-4)
    assert whole["kl"][1] < whole["kl"][0] and whole["grad_norms"][0] > 0 and not whole["moved"]
    for tp, pp in ((2, 1), (1, 2)):
        for rank in run_ranks(2, pulled_back, str(folder), str(other), tp, pp, []):
            assert rank["kl"] == pytest.approx(whole["kl"], rel=1e-5)
            assert rank["log_probs"] == pytest.approx(whole["log_probs"], rel=1e-6)
            assert rank["grad_norms"] == pytest.approx(whole["grad_norms"], rel=2e-5)
