"""A step depends on the rollouts alone: not on micro-batch size, their order, the merging of equal answers,
nor on who trains which."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.data.packing import merge_identical, pack
from rlsc_mcore.types import Rollout, UniqueSequence
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

STOP = frozenset({0})


def one_by_one(rollouts: list[Rollout]) -> list[UniqueSequence]:
    """Every rollout as a sequence of its own, equal answers included."""
    groups = {
        index: number
        for number, index in enumerate(dict.fromkeys(rollout.question_index for rollout in rollouts))
    }
    return [
        UniqueSequence(rollout, groups[rollout.question_index], 1, (True,) * len(rollout.response_ids))
        for rollout in rollouts
    ]


def with_repeats() -> list[Rollout]:
    """Five questions with four answers each, several of them equal."""
    rollouts = make_rollouts(num_questions=5, num_samples=4)
    return [
        *rollouts,
        *(rollout for rollout in rollouts if rollout.question_index in (1, 3) and rollout.sample_index < 2),
    ]


def gradients_of_every_packing(folder: str, confidence: str, multiple_of: int) -> dict[str, Any]:
    """Loss and fp32 gradients of the same rollouts, packed in several ways."""
    from rlsc_mcore.algorithm.objective import WeightedObjective
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    config = tiny_config(folder, ["--algorithm.confidence", confidence])
    trainer = Trainer(config, Path(folder), backend, groups)
    rollouts = with_repeats()
    shuffled = random.Random(3).sample(rollouts, len(rollouts))
    options: dict[str, Any] = {"train_end_token": True, "train_truncated": True, "stop_token_ids": STOP}
    merged = merge_identical(rollouts, **options)
    masked = merge_identical(
        [Rollout(9, 0, (1, 2), (3, 4), (-1.0, -1.0), "length", 0)],
        train_end_token=True,
        train_truncated=False,
        stop_token_ids=STOP,
    )
    ways = {
        "one pass": pack(merged, 4096, multiple_of=multiple_of),
        "several passes": pack(merged, 64, multiple_of=multiple_of),
        "a pass each": pack(merged, 1, multiple_of=multiple_of),
        "padded": pack(merged, 64, multiple_of=8),
        "another order": pack(merge_identical(shuffled, **options), 64, multiple_of=multiple_of),
        "not merged": pack(one_by_one(rollouts), 64, multiple_of=multiple_of),
        "with an all-masked pass": [*pack(masked, 64), *pack(merged, 64, multiple_of=multiple_of)],
    }
    assert len(ways["one pass"]) == 1 < len(ways["several passes"]) < len(ways["a pass each"])
    found = {}
    for name, batches in ways.items():
        loss, scores = trainer.accumulate_gradients(
            batches, WeightedObjective(config.algorithm, len(rollouts))
        )
        gradients = {weight.name: weight.parameter.main_grad.clone() for weight in trainer.policy.weights}
        found[name] = (
            float(loss),
            gradients,
            float((scores.multiplicity * scores.weights).sum()),
            float(scores.multiplicity.sum()),
        )
    empty, _ = trainer.accumulate_gradients([], WeightedObjective(config.algorithm, len(rollouts)))
    assert float(empty) == 0 and not any(
        weight.parameter.main_grad.any() for weight in trainer.policy.weights
    )
    alone, scores = trainer.accumulate_gradients(pack(masked, 64), WeightedObjective(config.algorithm, 1))
    assert float(alone) == 0 and not any(
        weight.parameter.main_grad.any() for weight in trainer.policy.weights
    )
    assert len(scores.weights) == 0
    return found


@pytest.mark.parametrize("confidence", ["sequence", "length_normalized", "token", "group_softmax"])
def test_gradients_do_not_depend_on_packing(tmp_path: Path, confidence: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (found,) = run_ranks(1, gradients_of_every_packing, folder, confidence, 1)
    loss, gradients, weight, count = found.pop("one pass")
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-3 and loss > 0
    for name, (other_loss, other_gradients, other_weight, other_count) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert other_weight == pytest.approx(weight, rel=1e-6), name
        assert other_count == count, name
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(
                other_gradients[parameter],
                gradient,
                rtol=0,
                atol=1e-6 * largest,
                msg=lambda text, n=name, p=parameter: f"{n}: {p}: {text}",
            )


def gradients_of_random_shares(
    folder: str, confidence: str, seeds: list[int]
) -> list[tuple[float, dict[str, Any]]]:
    """Loss and summed fp32 gradients of the same sequences, given to the data-parallel ranks at random; one
    may get none."""
    from rlsc_mcore.algorithm.objective import WeightedObjective
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    # Without the distributed optimizer every rank holds the whole sum.
    config = tiny_config(folder, ["--algorithm.confidence", confidence, "--optimizer.distributed", "False"])
    trainer = Trainer(config, Path(folder), backend, groups)
    rollouts = with_repeats()
    sequences = merge_identical(rollouts, train_end_token=True, train_truncated=True, stop_token_ids=STOP)
    found = []
    for seed in seeds:
        stream = random.Random(seed)
        mine = [sequence for sequence in sequences if stream.randrange(groups.dp_size) == groups.dp_rank]
        batches = pack(mine, stream.choice([1, 64, 4096]))
        loss, _ = trainer.accumulate_gradients(batches, WeightedObjective(config.algorithm, len(rollouts)))
        gradients = {weight.name: weight.parameter.main_grad.clone() for weight in trainer.policy.weights}
        found.append((float(groups.sum_over_dp(loss)), gradients))
    return found


@pytest.mark.parametrize("confidence", ["sequence", "group_softmax"])
def test_gradients_do_not_depend_on_who_trains_which(tmp_path: Path, confidence: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (((loss, gradients),),) = run_ranks(1, gradients_of_random_shares, folder, confidence, [0])
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for rank in run_ranks(4, gradients_of_random_shares, folder, confidence, list(range(6))):
        for other_loss, other_gradients in rank:
            assert other_loss == pytest.approx(loss, rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    other_gradients[name],
                    gradient,
                    rtol=0,
                    atol=1e-6 * largest,
                    msg=lambda text, n=name: f"{n}: {text}",
                )
