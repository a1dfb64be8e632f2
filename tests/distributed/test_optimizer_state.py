"""The checkpoint layout of the optimizer: boxes against numpy, nothing gathered or copied, Megatron's own
layout read."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.test_overlap import GATHER, make_batches, make_trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder

BF16 = ["--model.dtype", "bfloat16"]


@settings(deadline=None)  # the first call imports Megatron
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), st.data())
def test_boxes_are_the_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    from rlsc_mcore.training.optimizer_state import boxes

    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = np.arange(numel).reshape(shape)
    seen: list[int] = []
    parts = list(boxes(shape, start, stop))
    for box in parts:
        elements = whole[
            tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))
        ]
        assert elements.ravel().tolist() == list(range(box.start, box.stop))
        seen += elements.ravel().tolist()
    assert seen == list(range(start, stop)) and len(parts) <= 2 * len(shape) - 1


def described(folder: str, tp: int, flags: list[str]) -> dict[str, Any]:
    """Where the tensors of a checkpoint lie, and how many bytes this rank writes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from rlsc_mcore.training.checkpoint import sharded_state
    from rlsc_mcore.training.offload import state_tensors

    trainer = make_trainer(folder, tp, flags)
    batches, count = make_batches(trainer, 0, lonely=False)
    trainer.step(batches, 0, count)
    weights = trainer.memory()["weights"].keys()
    own = {tensor.untyped_storage().data_ptr() for tensor in state_tensors(trainer.optimizer, weights)} | set(
        weights
    )
    state = sharded_state(trainer, is_loading=False)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    main = [tensor for tensor in tensors if not any(tensor.replica_id)]
    return {
        "copied": [tensor.key for tensor in tensors if tensor.data.untyped_storage().data_ptr() not in own],
        "bytes": sum(tensor.data.nbytes for tensor in main),
        "numel": sum(weight.parameter.numel() for weight in trainer.policy.weights),
    }


@pytest.mark.parametrize(
    ("flags", "per_parameter"),
    [([], 16), (BF16, 14), ([*BF16, *GATHER], 14)],
    ids=["float32", "bfloat16", "overlapped"],
)
def test_every_rank_writes_its_share_from_where_it_lies(
    tmp_path: Path, flags: list[str], per_parameter: int
) -> None:
    """Weights and state, divided by the ranks: no rank writes, or brings together, the state of another."""
    folder = str(make_model_folder(tmp_path / "model"))
    ranks = run_ranks(4, described, folder, 1, flags)
    assert not any(rank["copied"] for rank in ranks)
    assert sum(rank["bytes"] for rank in ranks) == per_parameter * ranks[0]["numel"]
    for rank in ranks:
        assert rank["bytes"] <= 1.02 * per_parameter * rank["numel"] / 4


def save_as_megatron_does(folder: str, run_dir: str, tp: int, flags: list[str]) -> list[torch.Tensor]:
    """Write the whole-shard layout of Megatron-Core by its own functions, in a folder as a run leaves it."""
    from megatron.core import dist_checkpointing, parallel_state

    from rlsc_mcore.training import checkpoint
    from rlsc_mcore.training.offload import state_tensors
    from tests.helpers.checkpoints import save_checkpoint

    def sharded_state(trainer: Any, *, is_loading: bool) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        model = trainer.ddp.module.sharded_state_dict(metadata={"dp_cp_group": group})
        model = {name: value for name, value in model.items() if not name.endswith("_extra_state")}
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        return {
            "model": model,
            "optimizer": trainer.optimizer.sharded_state_dict(
                model, is_loading=is_loading, metadata=metadata
            ),
        }

    trainer = make_trainer(folder, tp, flags)
    for step in range(2):
        batches, count = make_batches(trainer, step, lonely=False)
        trainer.step(batches, step, count)
    original, checkpoint.sharded_state = checkpoint.sharded_state, sharded_state
    save_checkpoint(Path(run_dir), trainer, 2, 2, "questions", 1)
    checkpoint.sharded_state = original
    assert dist_checkpointing.check_is_distributed_checkpoint(
        str(Path(run_dir) / "checkpoints" / "step_000002")
    )
    return [tensor.clone() for tensor in state_tensors(trainer.optimizer, trainer.memory()["weights"].keys())]


def load(folder: str, run_dir: str, tp: int, flags: list[str]) -> tuple[list[torch.Tensor], list[int]]:
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from rlsc_mcore.training.offload import state_tensors

    trainer = make_trainer(folder, tp, flags)
    load_checkpoint(find_resumable(Path(run_dir)), trainer)
    tensors = state_tensors(trainer.optimizer, trainer.memory()["weights"].keys())
    return [tensor.clone() for tensor in tensors], [group["step"] for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_in_megatrons_own_layout_is_read(tmp_path: Path, tp: int) -> None:
    folder, run_dir = str(make_model_folder(tmp_path / "model")), str(tmp_path / "run")
    written = run_ranks(2, save_as_megatron_does, folder, run_dir, tp, BF16)
    for expected, (found, steps) in zip(written, run_ranks(2, load, folder, run_dir, tp, BF16), strict=True):
        assert set(steps) == {2} and len(found) == len(expected)
        assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))
