"""DPO's coefficients against autograd of the published loss in float64, ScPO's pairs by hand, and bad
input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig, ConfigError, RolloutConfig
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.grading.rewards import consistency_pair, trained_rollouts
from rlsc_mcore.types import Question, Rollout
from tests.helpers.group_samples import group_samples

LENGTHS = [3, 1, 4, 2, 5]  # chosen 0, rejected 0, rejected 1, chosen 1, padding
ADVANTAGES = torch.tensor([1.0, -1.0, -0.25, 0.25, 0.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1, -1])
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def published_loss(
    current_T: torch.Tensor, reference_T: torch.Tensor, beta: float, nll: float
) -> torch.Tensor:
    """The loss of two pairs with weights 1 and 0.25 (2305.18290 equation 7; 2411.04109 equation 2)."""
    current, reference = current_T.split(LENGTHS), reference_T.split(LENGTHS)
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected, weight in ((0, 1, 1.0), (3, 2, 0.25)):
        ratios = [current[i].sum() - reference[i].sum() for i in (chosen, rejected)]
        preference = -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
        total = total + weight * (preference - nll * current[chosen].sum() / LENGTHS[chosen])
    return total


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beta=st.sampled_from([0.05, 0.1, 0.5, 5.0]),
    nll=st.sampled_from([0.0, 1.0]),
    objective=st.sampled_from(["dpo", "scpo"]),
)
def test_coefficients_are_the_gradient_of_the_published_loss(
    seed: int, beta: float, nll: float, objective: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(LENGTHS)
    reference = -torch.rand(num_tokens, generator=generator) * 3
    current = reference + torch.randn(num_tokens, generator=generator) * 0.5
    options = AlgorithmConfig(objective=objective, reduction="sum", dpo_beta=beta, dpo_nll=nll)
    made = WeightedObjective(options, 2)
    counts = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    ratios = torch.stack([part.double().sum() for part in (current - reference).split(LENGTHS)])
    margins = made.rule.group_values(group_samples(ratios, counts, GROUPS, ADVANTAGES))
    mask = torch.ones(num_tokens, dtype=torch.bool)
    found = made.token_coefficients(reference, mask, CU_SEQLENS, counts, margins, ADVANTAGES, current)
    variable = current.double().requires_grad_()
    published_loss(variable, reference.double(), beta, nll).backward()
    assert variable.grad is not None
    torch.testing.assert_close(found.double(), -variable.grad, rtol=2e-5, atol=1e-7)


def test_a_question_without_a_pair_has_no_margin() -> None:
    rule = WeightedObjective(AlgorithmConfig(objective="scpo"), 1).rule
    ratios = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    signed = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    assert rule.group_values(group_samples(ratios, signed.abs(), [0, 0, 1], signed.sign())).tolist() == [
        0.0,
        0.0,
        0.0,
    ]
    several = rule.group_values(group_samples(ratios, [1.0, 3.0, 2.0], [4, 4, 4], [1.0, 1.0, -1.0]))
    assert several.tolist() == [(3.0 + 3 * 5.0) / 4 - 7.0] * 3


def test_majority_against_minority() -> None:
    responses = [
        "a \\boxed{1}",
        "\\boxed{2}",
        "b \\boxed{1}",
        "\\boxed{3}",
        "none",
        "\\boxed{2}",
        "a \\boxed{1}",
    ]
    weight = (3 - 1) / 7
    assert consistency_pair(responses) == [weight / 2, 0, 0, -weight, 0, 0, weight / 2]
    assert consistency_pair(["\\boxed{1}", "\\boxed{2}"]) == [0.0, 0.0]
    assert consistency_pair(["\\boxed{1}", "none"]) == [0.0, 0.0]
    rollouts = [Rollout(0, i, (1,), (i,), (-1.0,), "stop", 0, text=text) for i, text in enumerate(responses)]
    trained = trained_rollouts(
        AlgorithmConfig(objective="scpo"), RolloutConfig(num_samples=7), rollouts, [Question(0, "?", None)]
    )
    assert [value for _, value in trained] == consistency_pair(responses), "no mean is subtracted"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--algorithm.objective", "dpo", "--rollout.num-samples", "16"], "rollout.num_samples: expected 2"),
        (["--algorithm.objective", "offline_rewards", "--rollout.num-samples", "2"], "expected 1"),
        (["--algorithm.objective", "scpo", "--rollout.num-samples", "1"], "rollout.num_samples"),
        (["--algorithm.objective", "scpo", "--rollout.num-trained", "4"], "rollout.num_trained"),
        (["--algorithm.dpo-beta", "0"], "algorithm.dpo_beta"),
        (["--algorithm.dpo-nll", "-1"], "algorithm.dpo_nll"),
    ],
)
def test_refused(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(["--run-dir", "run", "--model.path", "model", "--data.path", "data", *flags])
