"""Traps of Megatron-Core 0.16.1 that would be silent: each was seen, each must stay shut."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config


def make(folder: str, tp: int, *flags: str) -> tuple[Any, list[Any], int]:
    """A trainer and this rank's batches of four fixed questions."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    config = tiny_config(folder, ["--parallel.tp", str(tp), "--optimizer.lr", "1e-3", *flags])
    trainer = Trainer(config, Path(folder), backend, groups)
    rollouts = make_rollouts(num_questions=4, num_samples=3)
    mine = [rollout for rollout in rollouts if rollout.question_index % groups.dp_size == groups.dp_rank]
    sequences = merge_identical(
        mine, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    return trainer, pack(sequences, 64, multiple_of=tp), len(rollouts)


def norms(folder: str, tp: int) -> dict[str, Any]:
    """Megatron's gradient norm beside one put together from every shard."""
    import torch.distributed as dist

    from rlsc_mcore.algorithm.objective import WeightedObjective

    trainer, batches, count = make(folder, tp, "--optimizer.clip-grad", "1e-3")
    trainer.accumulate_gradients(batches, WeightedObjective(trainer.config.algorithm, count))
    squares = torch.zeros((), dtype=torch.float64)
    for weight in trainer.policy.weights:
        is_sharded = weight.tp_dim is not None
        if is_sharded or trainer.groups.tp_rank == 0:
            squares += weight.parameter.main_grad.double().square().sum()
    dist.all_reduce(squares)
    with trainer.backend.megatron():
        trainer.optimizer.prepare_grads()
        found = float(trainer.optimizer.get_grad_norm())
    marked = {w.name for w in trainer.policy.weights if getattr(w.parameter, "tensor_model_parallel", False)}
    return {
        "found": found,
        "whole": float(squares.sqrt()),
        "marked": marked,
        "sharded": {w.name for w in trainer.policy.weights if w.tp_dim is not None},
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_gradient_norm_counts_every_shard_once(tmp_path: Path, tied: bool) -> None:
    """Trap 1: parameters without `tensor_model_parallel` are taken for duplicates and left out; clipping is
    then wrong."""
    folder = str(make_model_folder(tmp_path / "model", tied=tied))
    ranks = run_ranks(2, norms, folder, 2)
    (alone,) = run_ranks(1, norms, folder, 1)
    assert alone["found"] == pytest.approx(alone["whole"], rel=1e-6)
    for rank in ranks:
        assert rank["marked"] == rank["sharded"]
        assert rank["found"] == pytest.approx(rank["whole"], rel=1e-6)
        assert rank["found"] == pytest.approx(alone["found"], rel=2e-5)


def buckets_and_processes(folder: str, run_dir: str) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from tests.helpers.checkpoints import save_checkpoint

    trainer, batches, count = make(folder, 1)
    trainer.step(batches, 0, count)
    save_checkpoint(Path(run_dir), trainer, 1, 1, "questions", 1)
    buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    return {
        "buckets": [len(buffer.buckets) for buffer in buffers],
        "overlap": (trainer.ddp.ddp_config.overlap_grad_reduce, trainer.ddp.ddp_config.overlap_param_gather),
        "queue": type(filesystem_async._results_queue).__module__,
        "children": [process.name for process in multiprocessing.active_children()],
    }


@pytest.mark.parametrize("world", [1, 2])
def test_one_bucket_per_buffer(tmp_path: Path, world: int) -> None:
    """Trap 2: by default nothing is split into buckets. Trap 6: no process is spawned to save.

    Trap 3: without overlapped gathering no rank's parameters are stale after a step.
    """
    folder = str(make_model_folder(tmp_path / "model"))
    for rank in run_ranks(world, buckets_and_processes, folder, str(tmp_path / "run")):
        assert set(rank["buckets"]) == {1}
        assert rank["overlap"] == (False, False)
        assert (
            rank["queue"] == "queue"
        )  # and not a proxy of a multiprocessing manager, which would import the entry script again
        assert not [name for name in rank["children"] if "Manager" in name]


def parameters_after_a_step(folder: str) -> dict[str, Any]:
    trainer, batches, count = make(folder, 1)
    pointers = [weight.parameter.data_ptr() for weight in trainer.policy.weights]
    before = [weight.parameter.detach().clone() for weight in trainer.policy.weights]
    trainer.step(batches, 0, count)
    return {
        "weights": {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights},
        "moved": pointers != [weight.parameter.data_ptr() for weight in trainer.policy.weights],
        "changed": [
            weight.name
            for weight, old in zip(trainer.policy.weights, before, strict=True)
            if not torch.equal(weight.parameter, old)
        ],
        "names": [weight.name for weight in trainer.policy.weights],
    }


def test_every_rank_has_every_parameter_right_after_the_step(tmp_path: Path) -> None:
    """Trap 3, and what aliasing stands on: the parameters' storage never moves."""
    folder = str(make_model_folder(tmp_path / "model"))
    left, right = run_ranks(2, parameters_after_a_step, folder)
    assert not left["moved"] and not right["moved"]
    assert left["changed"] == right["changed"] == left["names"]
    for name, tensor in left["weights"].items():
        assert torch.equal(right["weights"][name], tensor), name


def step_after_scoring(folder: str, tp: int, score_first: bool) -> dict[str, Any]:
    trainer, batches, count = make(folder, tp)
    scored = trainer.token_log_probs(batches) if score_first else []
    assert all(not values.requires_grad and not values.is_inference() for values in scored)
    outcome = trainer.step(batches, 0, count)
    again = trainer.token_log_probs(batches) if score_first else []
    return {"loss": outcome.loss, "norm": outcome.grad_norm, "scored": scored, "again": again}


def test_scoring_without_gradient_does_not_disturb_training(tmp_path: Path) -> None:
    """Trap 4: a pass under torch.inference_mode poisons Megatron's gather buffer under sequence
    parallelism."""
    folder = str(make_model_folder(tmp_path / "model"))
    plain = run_ranks(2, step_after_scoring, folder, 2, False)
    scored = run_ranks(2, step_after_scoring, folder, 2, True)
    (alone,) = run_ranks(1, step_after_scoring, folder, 1, True)
    for rank in (0, 1):
        assert (scored[rank]["loss"], scored[rank]["norm"]) == (plain[rank]["loss"], plain[rank]["norm"])
        for left, right in zip(scored[rank]["scored"], scored[1 - rank]["scored"], strict=True):
            assert torch.equal(left, right)
        for left, right in zip(scored[rank]["scored"], alone["scored"], strict=True):
            torch.testing.assert_close(left[: len(right)], right[: len(left)], rtol=0, atol=2e-5)
        assert not all(
            torch.equal(a, b) for a, b in zip(scored[rank]["scored"], scored[rank]["again"], strict=True)
        )


def step_with(folder: str, tp: int, *flags: str) -> dict[str, Any]:
    trainer, batches, count = make(folder, tp, "--optimizer.eps", "1e-2", *flags)
    outcome = trainer.step(batches, 0, count)
    return {
        "loss": outcome.loss,
        "norm": outcome.grad_norm,
        "weights": {w.name: w.parameter.detach().clone() for w in trainer.policy.weights},
    }


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("tp", [1, 2])
def test_recomputation_changes_nothing(tmp_path: Path, tp: int, recompute: str) -> None:
    """Recomputation saves and restores a CUDA random state, which a CPU does not have."""
    folder = str(make_model_folder(tmp_path / "model"))
    kept = run_ranks(tp, step_with, folder, tp)
    again = run_ranks(tp, step_with, folder, tp, "--training.recompute", recompute)
    for left, right in zip(kept, again, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-6) and right["norm"] == pytest.approx(
            left["norm"], rel=1e-5
        )
        for name, tensor in left["weights"].items():
            torch.testing.assert_close(
                right["weights"][name], tensor, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def clipped_steps(folder: str, clip: str) -> list[torch.Tensor]:
    """Weights after a plain gradient step whose clipped gradient is known: moments off, no decay."""
    flags = [
        "--optimizer.clip-grad",
        clip,
        "--optimizer.beta1",
        "0",
        "--optimizer.beta2",
        "0",
        "--optimizer.eps",
        "1e3",
        "--optimizer.weight-decay",
        "0",
    ]
    trainer, batches, count = make(folder, 1, "--optimizer.lr", "1", *flags)
    before = [weight.parameter.detach().clone() for weight in trainer.policy.weights]
    outcome = trainer.step(batches, 0, count)
    assert outcome.updated
    moved = [
        (weight.parameter.detach() - old).flatten()
        for weight, old in zip(trainer.policy.weights, before, strict=True)
    ]
    return [torch.cat(moved).double().norm(), torch.tensor(outcome.grad_norm)]


def test_clipping_limits_the_global_norm(tmp_path: Path) -> None:
    """With a huge epsilon AdamW moves by gradient / epsilon, so that the norm of the move is the clipped norm
    over epsilon."""
    folder = str(make_model_folder(tmp_path / "model"))
    ((free, norm),) = run_ranks(1, clipped_steps, folder, "0")
    assert float(free) == pytest.approx(float(norm) / 1e3, rel=1e-2)
    limit = float(norm) / 4
    ((clipped, reported),) = run_ranks(1, clipped_steps, folder, str(limit))
    assert float(reported) == pytest.approx(
        float(norm), rel=1e-6
    )  # the norm before clipping is what is reported
    assert float(clipped) == pytest.approx(limit / 1e3, rel=1e-2)


def skipped_step(folder: str, poison: bool) -> dict[str, Any]:
    """A step whose gradient is not finite on one rank only."""
    trainer, batches, count = make(folder, 1)
    before = {w.name: w.parameter.detach().clone() for w in trainer.policy.weights}
    if poison and trainer.groups.dp_rank == 1:
        handle = trainer.policy.weights[0].parameter.register_hook(lambda gradient: gradient * float("nan"))
        outcome = trainer.step(batches, 0, count)
        handle.remove()
    else:
        outcome = trainer.step(batches, 0, count)
    same = all(torch.equal(w.parameter, before[w.name]) for w in trainer.policy.weights)
    after = trainer.step(batches, 1, count)
    return {
        "updated": outcome.updated,
        "same": same,
        "norm": outcome.grad_norm,
        "next": (after.updated, after.loss),
    }


def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    for rank in run_ranks(2, skipped_step, folder, True):
        assert not rank["updated"] and rank["same"] and rank["norm"] != rank["norm"]
        assert rank["next"][0] and rank["next"][1] == pytest.approx(rank["next"][1])
    clean = run_ranks(2, skipped_step, folder, False)
    assert clean[0]["updated"] and not clean[0]["same"]
