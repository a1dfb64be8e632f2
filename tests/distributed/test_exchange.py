"""Rollouts change ranks before training: nothing lost, FLOPs equal, and the step is the one that a single rank takes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.data.balance import CostModel
from rlsc_mcore.types import Rollout
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

OPTIONS: dict[str, Any] = {"train_end_token": True, "train_truncated": True, "stop_token_ids": frozenset({0})}
COST = CostModel(per_token=3.0, per_token_pair=0.25, per_trained_token=2.0)


def skewed(num_ranks: int, rank: int) -> list[Rollout]:
    """This rank's rollouts: rank 0 sampled most, and question 3 was asked on every rank (with the same answers)."""
    rollouts = make_rollouts(num_questions=6, num_samples=4)
    owner = {0: 0, 1: 0, 2: 0, 4: 0, 5: num_ranks - 1}
    return [rollout for rollout in rollouts if owner.get(rollout.question_index, rank) == rank]


def everything(num_ranks: int) -> list[Rollout]:
    return [rollout for rank in range(num_ranks) for rollout in skewed(num_ranks, rank)]


def exchanged(num_ranks: int) -> tuple[Any, list[tuple[int, tuple[int, ...], tuple[int, ...], int, int]]]:
    from rlsc_mcore.data.packing import merge_identical
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.redistribute import redistribute_sequences

    groups = initialize_groups(get_backend(), 1)
    found = redistribute_sequences(merge_identical(skewed(num_ranks, groups.dp_rank), **OPTIONS), COST, groups)
    rows = [(s.group, s.rollout.prompt_ids, s.rollout.response_ids, s.multiplicity, sum(s.trained)) for s in found.sequences]
    return found, rows


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_answer_is_on_one_rank_with_all_its_samples(num_ranks: int) -> None:
    results = run_ranks(num_ranks, exchanged, num_ranks)
    rollouts = everything(num_ranks)
    expected = Counter((rollout.prompt_ids, rollout.response_ids) for rollout in rollouts)
    rows = [row for _, part in results for row in part]
    assert len(rows) == len(expected) == results[0][0].num_sequences
    assert {(prompt, response): count for _, prompt, response, count, _ in rows} == expected
    # One number per question, the same on every rank.
    assert len({(group, prompt) for group, prompt, *_ in rows}) == len({prompt for _, prompt, *_ in rows}) == 6
    assert sorted({group for group, *_ in rows}) == list(range(6))
    work = [sum(COST.flops(len(prompt) + len(response), trained) for _, prompt, response, _, trained in part) for _, part in results]
    heaviest = max(COST.flops(len(prompt) + len(response), trained) for _, prompt, response, _, trained in rows)
    assert max(work) - sum(work) / num_ranks <= heaviest
    first = results[0][0]
    for found, _ in results:
        assert found.imbalance == pytest.approx(max(work) / (sum(work) / num_ranks) - 1, abs=1e-12)
        assert found.num_tokens == sum(len(prompt) + len(response) for _, prompt, response, _, _ in rows)
        assert found.num_tokens_unmerged == sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        assert (found.moved_share, found.imbalance_sampled) == (first.moved_share, first.imbalance_sampled)
    if num_ranks > 1:
        assert first.imbalance < 0.1 < first.imbalance_sampled and 0 < first.moved_share < 0.7


def train_skewed(folder: str, num_sampling_ranks: int, tp: int, confidence: str) -> dict[str, Any]:
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.redistribute import redistribute_sequences
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    flags = ["--parallel.tp", str(tp), "--algorithm.confidence", confidence, "--optimizer.lr", "1e-3", "--optimizer.eps", "1e-2"]
    trainer = Trainer(tiny_config(folder, flags), Path(folder), backend, groups)
    all_rollouts = everything(num_sampling_ranks)
    mine = skewed(num_sampling_ranks, groups.dp_rank) if groups.dp_size > 1 else all_rollouts
    found = redistribute_sequences(merge_identical(mine, **OPTIONS), trainer.policy.architecture.cost_model(), groups)
    batches = pack(found.sequences, 64, multiple_of=groups.tp_size)
    outcomes = [trainer.step(batches, step, len(all_rollouts)) for step in range(3)]
    weights = export_weights(trainer.policy.weights, trainer.policy.architecture, groups.tp_group, groups.tp_size)
    exported = {name: tensor.clone() for name, tensor in weights}
    return {
        "losses": [outcome.loss for outcome in outcomes],
        "grad_norms": [outcome.grad_norm for outcome in outcomes],
        "exported": exported if groups.rank == 0 else {},
    }


@pytest.mark.parametrize("confidence", ["sequence", "group_softmax"])
@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 2)], ids=["dp2", "tp2_dp2"])
def test_a_step_after_the_exchange_equals_one_rank_s(tmp_path: Path, world: int, tp: int, confidence: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (alone,) = run_ranks(1, train_skewed, folder, 2, 1, confidence)
    ranks = run_ranks(world, train_skewed, folder, 2, tp, confidence)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)
    for name, tensor in alone["exported"].items():
        torch.testing.assert_close(ranks[0]["exported"][name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
