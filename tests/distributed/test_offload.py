"""Optimizer state moved out while the engine would sample, and back: freed in between, bit for bit, weights
where they were."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_overlap import make_batches, make_trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder

BF16 = ["--model.dtype", "bfloat16"]
WHOLE = ["--optimizer.distributed", "False"]


def state_of(trainer: Any) -> list[torch.Tensor]:
    from rlsc_mcore.training.offload import state_tensors

    return state_tensors(trainer.optimizer, trainer.memory()["weights"].keys())


def with_offload(trainer: Any) -> Any:
    """What optimizer.offload_during_rollout builds on a GPU, from memory of the CPU to memory of the CPU."""
    from rlsc_mcore.training.offload import StateOffload

    trainer.offload = StateOffload(trainer.optimizer, trainer.memory()["weights"].keys(), pin=False)
    return trainer


def train(folder: str, tp: int, flags: list[str], offload: bool) -> dict[str, Any]:
    from torch.multiprocessing.reductions import StorageWeakRef

    trainer = make_trainer(folder, tp, flags)
    addresses = [weight.parameter.data_ptr() for weight in trainer.policy.weights]
    seen: dict[str, Any] = {"freed": [], "equal": [], "poisoned": 0}
    if offload:
        with_offload(trainer)
    for step in range(3):
        batches, count = make_batches(trainer, step, lonely=False)
        trainer.step(batches, step, count)
        tensors = state_of(trainer)
        before = [tensor.clone() for tensor in tensors]
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        trainer.release_memory()
        if offload:
            assert trainer.offload.is_out and [id(tensor) for tensor in state_of(trainer)] == [
                id(tensor) for tensor in tensors
            ]
            trainer.release_memory()  # twice is once
            seen["freed"] += [storage.expired() for storage in storages]
            seen["equal"] += [torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True)]
            trainer.offload.back()
            for host in trainer.offload._host:  # nothing on the device is the host's copy any more
                host.fill_(float("nan"))
                seen["poisoned"] += 1
            seen["equal"] += [torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True)]
            trainer.offload.out()  # the next step brings it back by itself
    seen["moved"] = [weight.parameter.data_ptr() for weight in trainer.policy.weights] != addresses
    seen["bytes"] = {pool: sum(sizes.values()) for pool, sizes in trainer.memory().items()}
    seen["weights"] = {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}
    seen["state"] = [tensor.clone() for tensor in state_of(trainer)]
    return seen


def both(folder: str, tp: int, flags: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(folder, tp, flags, False), train(folder, tp, flags, True)


@pytest.mark.parametrize(
    ("world", "tp", "flags"),
    [(1, 1, []), (1, 1, [*BF16, *WHOLE]), (2, 1, BF16), (2, 2, BF16)],
    ids=["float32", "bfloat16 whole", "bfloat16 sharded", "bfloat16 tp 2"],
)
def test_training_goes_on_bit_for_bit(tmp_path: Path, world: int, tp: int, flags: list[str]) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    for one, other in run_ranks(world, both, folder, tp, flags):
        assert (
            other["freed"]
            and all(other["freed"])
            and all(other["equal"])
            and other["poisoned"] == len(other["freed"])
        )
        assert not other["moved"]  # the engine aliases the weights: their storage never moves
        assert one["bytes"] == other["bytes"] and one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(one["state"], other["state"], strict=True))


def test_the_pools_are_what_the_shapes_say(tmp_path: Path) -> None:
    """Per parameter: its own bytes, and 12 of master and moments (8 without a master), over the data-parallel
    ranks; no gradient."""
    folder = str(make_model_folder(tmp_path / "model"))
    for flags, dp, weight, state in (([], 1, 4, 8), ([*BF16, *WHOLE], 1, 2, 12), (BF16, 2, 2, 12)):
        for rank in run_ranks(dp, train, folder, 1, flags, False):
            numel = sum(tensor.numel() for tensor in rank["weights"].values())
            assert rank["bytes"]["weights"] == pytest.approx(weight * numel, rel=0.01)  # buffers are padded
            assert rank["bytes"]["gradients"] == 0  # freed with the workspace
            assert rank["bytes"]["optimizer"] == pytest.approx(state * numel / dp, rel=0.02)


def save(folder: str, run_dir: str, flags: list[str], asynchronous: bool) -> list[torch.Tensor]:
    """Save while the state is out, and disturb it at once."""
    from rlsc_mcore.training.checkpoint import CheckpointSaver

    trainer = with_offload(make_trainer(folder, 1, flags))
    batches, count = make_batches(trainer, 0, lonely=False)
    trainer.step(batches, 0, count)
    trainer.release_memory()
    expected = [tensor.clone() for tensor in state_of(trainer)]
    saver = CheckpointSaver(Path(run_dir), trainer, "questions", keep_last=1, asynchronous=asynchronous)
    saver.save(1, 1)
    if asynchronous:
        for host in trainer.offload._host:
            host.fill_(float("nan"))
    saver.finish()
    return expected


def load(folder: str, run_dir: str, flags: list[str]) -> list[torch.Tensor]:
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint

    trainer = make_trainer(folder, 1, flags)
    load_checkpoint(find_resumable(Path(run_dir)), trainer)
    return [tensor.clone() for tensor in state_of(trainer)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited for", "beside the training"])
@pytest.mark.parametrize("flags", [BF16, [*BF16, *WHOLE]], ids=["sharded", "whole"])
def test_a_checkpoint_is_written_from_the_host(tmp_path: Path, flags: list[str], asynchronous: bool) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    for expected, found in zip(
        run_ranks(2, save, folder, str(tmp_path), flags, asynchronous),
        run_ranks(2, load, folder, str(tmp_path), flags),
        strict=True,
    ):
        assert len(expected) == len(found) and all(
            torch.equal(a, b) for a, b in zip(expected, found, strict=True)
        )
