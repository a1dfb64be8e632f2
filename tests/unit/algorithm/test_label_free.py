"""Label-free objectives against the papers' formulas in NumPy, sample by sample in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.algorithm.restrain import CENTER, FEWEST, PENALTY, WIDTH, restrained_advantages
from rlsc_mcore.algorithm.rule import GroupSamples
from rlsc_mcore.algorithm.scrl import votes
from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.grading.rewards import frequency_rewards
from rlsc_mcore.objectives import OBJECTIVES
from tests.helpers.group_samples import group_samples
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

Array = np.ndarray[Any, np.dtype[np.float64]]
ANSWERS = st.lists(st.none() | st.integers(0, 4), min_size=2, max_size=16)


def boxed(answers: list[int | None]) -> list[str]:
    return ["no idea" if answer is None else f"so \\boxed{{{answer}}}." for answer in answers]


def standardized(rewards: Array) -> Array:
    """GRPO's advantage with the sample standard deviation; 0 where all rewards are equal."""
    centered: Array = rewards - rewards.mean()
    deviation = rewards.std(ddof=1)
    return centered / deviation if deviation > 1e-6 else centered


def group(values: list[float], lengths: list[int], counts: list[int], rewards: list[float]) -> GroupSamples:
    """One question's sequences with the mean value `values` of their tokens, and a padding sequence."""
    sums = [value * length for value, length in zip(values, lengths, strict=True)]
    groups = [*[0] * len(values), -1]
    return group_samples([*sums, 7.0], [*counts, 0], groups, [*rewards, 0.0], [*lengths, 0])


def advantages(name: str, samples: GroupSamples, **options: Any) -> list[float]:
    algorithm = AlgorithmConfig(objective=name, **{"advantage": "standardized", **options})
    rule = OBJECTIVES[name].load_rule()(algorithm)
    found = rule.group_values(samples).tolist()
    assert found[-1] == 0, "padding"
    return list(found[:-1])


@pytest.mark.parametrize(("name", "sign"), [("self_certainty", 1), ("rent", -1)])
@given(
    sequences=st.lists(
        st.tuples(st.floats(0, 12, width=16), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=8
    )
)
def test_advantages_of_a_reward_of_the_pass(
    name: str, sign: int, sequences: list[tuple[float, int, int]]
) -> None:
    values, lengths, counts = ([*column] for column in zip(*sequences, strict=True))
    found = advantages(name, group(values, lengths, counts, [0.0] * len(values)))
    every_sample = np.repeat(sign * np.array(values), counts)
    expected = standardized(every_sample) if len(every_sample) > 1 else np.zeros(1)
    np.testing.assert_allclose(np.repeat(found, counts), expected, atol=1e-9)
    centered = advantages(name, group(values, lengths, counts, [0.0] * len(values)), advantage="centered")
    np.testing.assert_allclose(np.repeat(centered, counts), every_sample - every_sample.mean(), atol=1e-12)


def scrl_rewards(answers: list[int | None], entropies: Array) -> Array:
    """R of SCRL, answer by answer, with the paper's constants."""
    read = [answer for answer in answers if answer is not None]
    share = {answer: read.count(answer) / len(answers) for answer in read}
    ranked = [*sorted(share.values(), reverse=True), 0.0, 0.0]
    clear = ranked[0] >= 0.375 and ranked[0] - ranked[1] > 0.125
    rewards = []
    for position, answer in enumerate(answers):
        p = 0.0 if answer is None else share[answer]
        same = [position] if answer is None else [i for i, other in enumerate(answers) if other == answer]
        entropy = entropies[same].mean()
        reward = p if clear and answer is not None and p == ranked[0] else 0.0
        if p < 0.125 and entropy >= entropies.mean():
            reward += p - 0.125
        rewards.append(reward - 0.1 * (entropy - entropies.mean()))
    return np.array(rewards)


@given(answers=ANSWERS, seed=st.integers(0, 10**6))
def test_scrl(answers: list[int | None], seed: int) -> None:
    entropies = np.random.default_rng(seed).exponential(size=len(answers))
    counts = [1] * len(answers)
    samples = group(entropies.tolist(), [3] * len(answers), counts, votes(boxed(answers)))
    expected = scrl_rewards(answers, entropies)
    found = advantages("scrl", samples, advantage="centered")
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-9)


def test_scrl_counts_the_votes_that_are_not_trained() -> None:
    """The two largest shares differ by less than the margin among all votes, by more among the trained
    ones."""
    answers: list[int | None] = [1, 1, 1, 2, 1, 2, 2, 2]
    entropies = [0.5] * 4
    trained = group(entropies, [2] * 4, [1] * 4, votes(boxed(answers))[:4])
    assert advantages("scrl", trained, advantage="centered") == pytest.approx([0.0] * 4)
    alone = group(entropies, [2] * 4, [1] * 4, votes(boxed(answers[:4])))
    assert advantages("scrl", alone, advantage="centered") == pytest.approx([0.1875] * 3 + [-0.5625])


@given(answers=ANSWERS)
def test_restrain(answers: list[int | None]) -> None:
    read = sorted({answer for answer in answers if answer is not None})
    share = np.array([answers.count(answer) / len(answers) for answer in read])
    if max(share, default=0.0) < FEWEST:
        expected = np.full(len(answers), -PENALTY)
    else:
        weights = np.exp(-((share - CENTER) ** 2) / (2 * WIDTH**2))
        indicators = [np.array([float(other == answer) for other in answers]) for answer in read]
        advantage = np.stack([standardized(indicator) for indicator in indicators])
        expected = (weights / weights.sum()) @ advantage
    np.testing.assert_allclose(restrained_advantages(boxed(answers)), expected, atol=1e-9)


def test_restrain_penalises_a_question_without_a_majority() -> None:
    assert restrained_advantages(boxed([1, 2, 3, 4, 5, 6])) == [-PENALTY] * 6
    assert restrained_advantages(boxed([None, None])) == [-PENALTY] * 2


def test_soft_frequency_rewards_shares_of_the_votes() -> None:
    answers: list[int | None] = [1, 1, 2, None]
    assert frequency_rewards(boxed(answers)) == [0.5, 0.5, 0.25, 0.0]
    assert OBJECTIVES["soft_frequency"].masks_box and OBJECTIVES["soft_frequency"].reward is not None


def first_step(
    folder: str, tp: int, objective: str, flags: list[str]
) -> tuple[float, list[float], dict[str, torch.Tensor]]:
    """Loss, weights per sequence (one data-parallel rank) and gradients of one batch, by Hugging Face
    names."""
    from rlsc_mcore.algorithm.objective import WeightedObjective
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    flags = ["--algorithm.objective", objective, "--parallel.tp", str(tp), *flags]
    trainer = Trainer(tiny_config(folder, flags), Path(folder), backend, groups)
    rollouts = make_rollouts(num_questions=3, num_samples=4)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset()
    )
    made = WeightedObjective(trainer.config.algorithm, len(rollouts))
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], 64, multiple_of=groups.tp_size)
    loss, scores = trainer.accumulate_gradients(batches, made)
    total = float(groups.sum_over_dp(loss))
    if groups.dp_size > 1:
        return total, [], {}
    for weight in trainer.policy.weights:
        weight.parameter.data.copy_(weight.parameter.main_grad)
    exported = export_weights(
        trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size
    )
    order = scores.sequence_ids.argsort()
    return total, scores.weights[order].tolist(), {name: tensor.clone() for name, tensor in exported}


@pytest.mark.parametrize("objective", ["self_certainty", "rent"])
def test_a_step_equals_a_plain_model(tmp_path: Path, objective: str) -> None:
    """Rewards and gradient from all logits of a transformers model, each sample its own pass; then 2
    ranks."""
    from transformers import Qwen2ForCausalLM

    folder = str(make_model_folder(tmp_path / "model"))
    flags = ["--algorithm.advantage", "standardized", "--algorithm.log-prob-temperature", "1.0"]
    ((loss, _, found),) = run_ranks(1, first_step, folder, 1, objective, flags)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rewards: dict[int, list[float]] = {}
    log_probs: dict[int, list[torch.Tensor]] = {}
    rollouts = make_rollouts(num_questions=3, num_samples=4)
    for sample in rollouts:
        if not sample.response_ids:
            continue
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        first = len(sample.prompt_ids) - 1
        log_p = model(ids).logits[0, first:-1].log_softmax(-1)
        p = log_p.detach().exp().numpy()
        vocab = p.shape[1]
        if objective == "self_certainty":
            per_token = (np.log(1 / vocab) - np.log(p)).mean(1)  # KL(U || p)
        else:
            per_token = (p * np.log(p)).sum(1)  # - H
        rewards.setdefault(sample.question_index, []).append(float(per_token.mean()))
        picked = log_p.gather(1, ids[0, first + 1 :, None]).sum()
        log_probs.setdefault(sample.question_index, []).append(picked)
    expected = torch.zeros((), dtype=torch.float64)
    for question, values in rewards.items():
        for advantage, log_p in zip(standardized(np.array(values)), log_probs[question], strict=True):
            expected = expected - advantage * log_p
    expected = expected / len(rollouts)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            largest = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name].double(), parameter.grad, rtol=0, atol=1e-4 * largest)
    for tp in (2, 1):  # the vocabulary, then the samples of a question, over two ranks
        for total, _, _ in run_ranks(2, first_step, folder, tp, objective, flags):
            assert total == pytest.approx(loss, rel=1e-4)
