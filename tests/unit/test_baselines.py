"""The baselines: rewards by hand, advantages and losses against NumPy, and whole gradients against a plain
transformers model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.algorithm.entropy import entropy_loss
from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig, ConfigError, RolloutConfig
from rlsc_mcore.grading.rewards import (
    answer_classes,
    check_labels,
    group_advantages,
    label_rewards,
    majority_rewards,
    trained_rollouts,
)
from rlsc_mcore.types import Question, Rollout
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config


def advantages(
    objective: str, rollouts: list[Rollout], questions: list[Question], **options: Any
) -> list[float]:
    """The advantage of each trained rollout; the sampling options hold all rollouts of a question."""
    rollout = RolloutConfig(
        num_samples=options.pop("num_samples", 64), num_trained=options.pop("num_trained", None)
    )
    algorithm = AlgorithmConfig(objective=objective, **options)
    return [advantage for _, advantage in trained_rollouts(algorithm, rollout, rollouts, questions)]


def boxed(*answers: str | None) -> list[str]:
    return ["no idea" if answer is None else f"so \\boxed{{{answer}}}." for answer in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["8", "7", "8"], [1, 0, 1]),
        (["7", "8", "8.0", "16/2"], [0, 1, 1, 1]),  # equal numbers are one answer, however they are written
        (["1/2", "\\frac{1}{2}", "3", "3"], [1, 1, 0, 0]),  # a tie: the first sampled wins
        ([None, None, "5"], [0, 0, 1]),  # what boxes nothing casts no vote
        ([None, None], [0, 0]),
        (["x+1", "1+x", "2"], [1, 1, 0]),
        ([], []),
    ],
)
def test_majority_rewards(answers: list[str | None], expected: list[float]) -> None:
    assert majority_rewards(boxed(*answers)) == expected


def test_label_rewards_need_the_box() -> None:
    assert label_rewards(
        ["so \\boxed{8}", "8", "\\boxed{9}", "8, no: \\boxed{8.0}"], Question(0, "?", "8")
    ) == [1, 0, 0, 1]


@given(st.lists(st.none() | st.integers(0, 5), max_size=20))
def test_answer_classes_partition_the_answers(values: list[int | None]) -> None:
    found = answer_classes(
        [None if value is None else f"{value}.0" for value in values], agree=lambda a, b: a == b
    )
    for i, first in enumerate(values):
        for j, second in enumerate(values):
            assert (found[i] == found[j]) == (first == second)
    assert all((label == -1) == (value is None) for label, value in zip(found, values, strict=True))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_advantages_are_rewards_minus_the_mean_of_their_question(samples: list[tuple[bool, int]]) -> None:
    rewards, groups = (
        np.array([float(right) for right, _ in samples]),
        np.array([group for _, group in samples]),
    )
    expected = rewards - np.array([rewards[groups == group].mean() for group in groups])
    np.testing.assert_allclose(group_advantages(rewards.tolist(), groups.tolist()), expected, atol=1e-15)


def rollout(question: int, text: str) -> Rollout:
    return Rollout(question, 0, (1,), (2, 3), (-1.0, -1.0), "stop", 0, text)


def test_rollouts_are_graded_question_by_question() -> None:
    questions = [Question(0, "a", "8"), Question(1, "b", "5")]
    rollouts = [rollout(1, text) for text in boxed("4", "4", "5", None)] + [
        rollout(0, text) for text in boxed("8", "8")
    ]
    assert advantages("majority_vote", rollouts, questions) == [0.5, 0.5, -0.5, -0.5, 0, 0]
    assert advantages("rlvr", rollouts, questions) == [-0.25, -0.25, 0.75, -0.25, 0, 0]
    assert advantages("rlsc", rollouts, questions) == [0.0] * 6


def test_rewards_of_any_answer_count_what_is_not_boxed() -> None:
    said = ["so 8", "The answer is 8.", "\\boxed{7}"]
    assert majority_rewards(said) == [0, 0, 1] and majority_rewards(said, answers="any") == [1, 1, 0]
    question = Question(0, "a", "8")
    assert label_rewards(said, question) == [0, 0, 0] and label_rewards(said, question, "any") == [1, 1, 0]
    rollouts = [rollout(0, text) for text in said]
    assert advantages("majority_vote", rollouts, [question], rewards="any") == pytest.approx(
        [1 / 3, 1 / 3, -2 / 3]
    )


def test_rewards_read_an_answer_by_the_questions_format() -> None:
    choice = Question(0, "a", "B", answer_format="choice")
    said = ["\\boxed{B: 5}", "\\boxed{\\text{Option B}}", "\\boxed{A}", "\\boxed{B, C}"]
    assert label_rewards(said, choice) == [1, 1, 0, 0]
    assert majority_rewards(said, choice) == [1, 1, 0, 0]
    assert label_rewards(["\\boxed{3.14}", "\\boxed{3.3}"], Question(0, "a", "3.1416", tolerance=0.01)) == [
        1,
        0,
    ]
    assert label_rewards(["\\boxed{2, 1}"], Question(0, "a", "1, 2")) == [1]


def test_rlvr_alone_refuses_questions_without_labels() -> None:
    questions = [Question(0, "a", "8"), Question(1, "b", None)]
    check_labels("majority_vote", questions, "file.jsonl")
    with pytest.raises(
        ConfigError, match=r"^algorithm.objective: rlvr needs labels, and question 1 of file.jsonl"
    ):
        check_labels("rlvr", questions, "file.jsonl")


@pytest.mark.parametrize("objective", ["majority_vote", "rlvr", "grpo", "empo"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_coefficients_are_advantages(objective: Any, reduction: Any) -> None:
    made = WeightedObjective(
        AlgorithmConfig(objective=objective, reduction=reduction, alpha=0.7), num_samples=8
    )
    mask, cu_seqlens = (
        torch.tensor([False, True, True, False, True]),
        torch.tensor([0, 3, 5], dtype=torch.int32),
    )
    found = made.token_coefficients(
        torch.full((5,), -1.0),
        mask,
        cu_seqlens,
        torch.tensor([3.0, 1.0]).double(),
        None,
        torch.tensor([0.25, -0.75]).double(),
    )
    scale = 8 if reduction == "mean" else 1
    assert found.tolist() == pytest.approx([0, 0.75 / scale, 0.75 / scale, 0, -0.75 / scale])
    assert not made.needs_group and not made.trains_entropy and made.alpha == 0


def test_entropy_loss_by_hand() -> None:
    entropy, mask = torch.tensor([9.0, 1.0, 2.0, 4.0]), torch.tensor([False, True, True, True])
    cu_seqlens, multiplicity = (
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
    )
    assert float(entropy_loss(entropy, mask, cu_seqlens, multiplicity, 4)) == pytest.approx(
        (3 * (1 + 2) + 4) / 4
    )
    assert WeightedObjective(AlgorithmConfig(objective="entropy"), 4).trains_entropy


def gradients(folder: str, objective: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The engine's loss and gradients of one batch, by Hugging Face names."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    trainer = Trainer(
        tiny_config(folder, ["--algorithm.objective", objective]), Path(folder), backend, groups
    )
    rollouts, values = batch()
    sequences = merge_identical(
        rollouts,
        train_end_token=True,
        train_truncated=True,
        stop_token_ids=frozenset({0}),
        advantages=values if objective == "majority_vote" else None,
    )
    made = WeightedObjective(trainer.config.algorithm, len(rollouts))
    loss, _ = trainer.accumulate_gradients(pack(sequences, 64), made)
    for weight in trainer.policy.weights:
        weight.parameter.data.copy_(weight.parameter.main_grad)
    exported = export_weights(
        trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size
    )
    return float(loss), {name: tensor.clone() for name, tensor in exported}


def batch() -> tuple[list[Rollout], list[float]]:
    rollouts = make_rollouts(num_questions=3, num_samples=3)
    answers = sorted({(r.question_index, r.response_ids) for r in rollouts})
    return rollouts, [math.sin(answers.index((r.question_index, r.response_ids))) for r in rollouts]


@pytest.mark.parametrize("objective", ["entropy", "majority_vote", "self_sft"])
def test_gradients_equal_a_plain_model(tmp_path: Path, objective: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    ((loss, found),) = run_ranks(1, gradients, folder, objective)
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rollouts, values = batch()
    expected = torch.zeros((), dtype=torch.float64)
    for sample, value in zip(rollouts, values, strict=True):
        if not sample.response_ids:
            continue
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        first = len(sample.prompt_ids) - 1
        log_p = (model(ids).logits[0, first:-1] / 0.5).log_softmax(-1)
        if objective == "entropy":
            expected = expected - (log_p.exp() * log_p).sum()
        else:
            weight = value if objective == "majority_vote" else 1.0
            expected = expected - weight * log_p.gather(1, ids[0, first + 1 :, None]).sum()
    expected = expected / len(rollouts)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                found[name].double(),
                parameter.grad,
                rtol=0,
                atol=2e-5 * scale,
                msg=lambda t, n=name: f"{n}: {t}",
            )
