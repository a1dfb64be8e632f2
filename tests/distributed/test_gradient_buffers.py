"""Gradient buffers: freed between updates without a change to training, and their data type."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import parse_config
from tests.distributed.test_overlap import GATHER, UPDATES, make_batches, make_trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder

BF16 = ["--model.dtype", "bfloat16"]
WHOLE = ["--optimizer.distributed", "False"]
BF16_GRADIENTS = [*BF16, "--optimizer.grad-dtype", "bfloat16"]


def train(folder: str, run_dir: str, tp: int, flags: list[str], release: bool) -> dict[str, Any]:
    """Train two steps, save, load into a new trainer and train two more; with `release`, free the buffers
    where a run does."""
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder, tp, flags)
    losses: list[float] = []
    held: list[int] = []
    for step in range(4):
        if step == 2:
            save_checkpoint(Path(run_dir), trainer, step, step, "questions", 1)
            trainer = make_trainer(folder, tp, flags)
            load_checkpoint(find_resumable(Path(run_dir)), trainer)
        if release:
            trainer.release_memory()
            held.append(sum(buffer.grad_data.untyped_storage().nbytes() for buffer in trainer.ddp.buffers))
            assert not trainer.memory()["gradients"]
        batches, count = make_batches(trainer, step, lonely=False)
        losses += [update.loss for update in trainer.step(batches, step, count).updates]
        (buffer,) = trainer.ddp.buffers
        storage = buffer.grad_data.untyped_storage()
        assert all(
            weight.parameter.main_grad.untyped_storage().data_ptr() == storage.data_ptr()
            for weight in trainer.policy.weights
        )
    return {
        "losses": losses,
        "held": held,
        "bytes": sum(trainer.memory()["gradients"].values()),
        "numel": sum(weight.parameter.numel() for weight in trainer.policy.weights),
        "weights": {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights},
    }


@pytest.mark.parametrize(
    ("world", "tp", "flags"),
    [
        (1, 1, WHOLE),
        (1, 1, [*BF16, *WHOLE]),
        (2, 1, BF16),
        (2, 1, [*GATHER, *UPDATES]),
        (2, 2, [*BF16_GRADIENTS, *UPDATES]),
    ],
    ids=["float32 whole", "bfloat16 whole", "bfloat16 sharded", "overlapped", "bfloat16 gradients, tp 2"],
)
def test_freed_buffers_change_nothing(tmp_path: Path, world: int, tp: int, flags: list[str]) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    kept = run_ranks(world, train, folder, str(tmp_path / "kept"), tp, flags, False)
    freed = run_ranks(world, train, folder, str(tmp_path / "freed"), tp, flags, True)
    for one, other in zip(kept, freed, strict=True):
        assert other["held"] == [0] * 4 and other["bytes"] == one["bytes"] > 0
        assert one["losses"] == other["losses"]
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


def test_gradients_in_bfloat16(tmp_path: Path) -> None:
    """Half the bytes, and the same training up to the rounding of bfloat16."""
    folder = str(make_model_folder(tmp_path / "model"))
    fine = run_ranks(2, train, folder, str(tmp_path / "fine"), 1, BF16, False)
    coarse = run_ranks(2, train, folder, str(tmp_path / "coarse"), 1, BF16_GRADIENTS, False)
    for one, other in zip(fine, coarse, strict=True):
        assert one["bytes"] == pytest.approx(4 * one["numel"], rel=0.01) and other["bytes"] == pytest.approx(
            one["bytes"] / 2, rel=0.01
        )
        assert other["losses"] == pytest.approx(one["losses"], rel=2e-2)


def test_gradients_are_never_coarser_than_the_weights() -> None:
    flags = [
        "--run-dir",
        "r",
        "--model.path",
        "m",
        "--data.path",
        "d",
        "--model.dtype",
        "float32",
        "--optimizer.grad-dtype",
        "bfloat16",
    ]
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.grad_dtype: expected float32 with model\.dtype float32, got 'bfloat16'",
    ):
        parse_config(flags)
