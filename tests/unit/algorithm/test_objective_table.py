"""The objective table: every row is complete, appears wherever a user chooses or reads an objective, and
trains a step."""

import itertools
import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.algorithm.rule import ObjectiveRule
from rlsc_mcore.commands.compare import VARIANTS
from rlsc_mcore.config import AlgorithmConfig
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.objectives import OBJECTIVES, Objective, describe_objectives
from rlsc_mcore.types import Question
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

REQUIRED = ["--run-dir", "run", "--model.path", "model", "--data.path", "data"]


@pytest.mark.parametrize("row", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_row_is_complete(row: Objective) -> None:
    assert row.name.isidentifier() and row.label and row.summary
    rule = row.load_rule()
    assert issubclass(rule, ObjectiveRule) and isinstance(
        rule(AlgorithmConfig(objective=row.name)), ObjectiveRule
    )
    module = __import__(rule.__module__, fromlist=["x"])
    assert "loss = " in module.__doc__, "the module's text states the loss"
    reward = row.load_reward()
    if reward is not None:
        rewards = reward(["so \\boxed{4}", "\\boxed{5}", "none", "\\boxed{4}"], Question(0, "2 + 2?", "4"))
        expected = {
            "format": [[1.0, 1.0, 0.0, 1.0]],
            "scpo": [[0.25, -0.25, 0.0, 0.0]],
            "random": [list(bits) for bits in itertools.product((0.0, 1.0), repeat=4)],
            "scrl": [[0.5, 2.25, -1.0, 0.5]],  # 2 * label + share
        }
        if row.name != "restrain":  # gives advantages: see test_label_free.py
            assert rewards in expected.get(row.name, ([1.0, 0.0, 0.0, 1.0], [0.5, 0.25, 0.0, 0.5]))
    assert not row.needs_labels or reward is not None


def test_the_configuration_follows_the_table() -> None:
    hint = typing.get_type_hints(AlgorithmConfig)["objective"]
    assert typing.get_args(hint) == tuple(OBJECTIVES)
    for row in OBJECTIVES.values():
        config = parse_config([*REQUIRED, "--algorithm.objective", row.name])
        assert config == parse_config([*REQUIRED, *row.flags])
        assert f"`{row.name}`: {row.summary}" in describe_objectives()
        if row.is_offline:  # the file sets the number of answers
            continue
        own = parse_config([*REQUIRED, "--algorithm.objective", row.name, "--rollout.num-samples", "70"])
        assert own.rollout.num_samples == 70, "a given flag wins over the objective's default"


def test_help_names_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for row in OBJECTIVES.values():
        assert f"`{row.name}`: {row.summary}" in text


def test_compare_offers_every_objective_and_variant() -> None:
    names = [name for row in OBJECTIVES.values() for name in (row.name, *row.variants)]
    assert list(VARIANTS) == names
    for name, flags in VARIANTS.items():
        config = parse_config([*REQUIRED, *flags])
        assert name.startswith(config.algorithm.objective)


def train_a_step(folder: str, objective: str) -> dict[str, Any]:
    """Train one step on random rollouts that box answers; return the outcome and how far the weights
    moved."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.grading.rewards import trained_rollouts
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    config = tiny_config(folder, ["--algorithm.objective", objective, "--optimizer.lr", "1e-3"])
    trainer = Trainer(config, Path(folder), backend, groups)
    sums = [(rollout, sum(rollout.response_ids)) for rollout in make_rollouts(num_questions=3, num_samples=3)]
    rollouts = [
        replace(rollout, text=f"\\boxed{{{total % 2}}}" if total % 3 else f"{total}")
        for rollout, total in sums
    ]
    questions = [Question(index, "?", "1") for index in range(3)]
    graded = trained_rollouts(config.algorithm, config.rollout, rollouts, questions)
    if OBJECTIVES[objective].distills:
        graded = [(rollout, float(rollout.sample_index % 2)) for rollout in rollouts if rollout.sample_index]
    if OBJECTIVES[objective].is_offline:  # the file gives the advantages
        graded = [(rollout, (-1.0) ** sum(rollout.response_ids)) for rollout in rollouts]
    sequences = merge_identical(
        [rollout for rollout, _ in graded],
        train_end_token=True,
        train_truncated=True,
        stop_token_ids=frozenset({0}),
        advantages=[advantage for _, advantage in graded],
    )
    if OBJECTIVES[objective].needs_careless:
        sequences = [replace(each, advantage=1.0) for each in sequences]
    if OBJECTIVES[objective].distills or OBJECTIVES[objective].needs_careless:
        sequences = [replace(each, teacher_prompt=(7, 8, 9, *each.rollout.prompt_ids)) for each in sequences]
    before = [weight.parameter.detach().clone() for weight in trainer.policy.weights]
    outcome = trainer.step(pack(sequences, 64), 0, len(rollouts))
    moved = max(
        float((w.parameter - b).abs().max()) for w, b in zip(trainer.policy.weights, before, strict=True)
    )
    return {"loss": float(outcome.loss), "grad_norm": float(outcome.grad_norm), "moved": moved}


@pytest.mark.distributed
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_a_step(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (outcome,) = run_ranks(1, train_a_step, str(make_model_folder(tmp_path / "model")), name)
    assert math.isfinite(outcome["loss"]) and outcome["grad_norm"] > 0 and outcome["moved"] > 1e-5
