"""A checkpoint written under one layout goes on under another: the same weights, the same next steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

FLAGS = ["--optimizer.lr", "1e-3", "--optimizer.eps", "1e-2", "--optimizer.weight-decay", "0.1"]


def run_steps(
    folder: str,
    run_dir: str,
    layout: tuple[int, int],
    first: int,
    steps: int,
    save: bool,
    dtype: str,
    distributed: bool,
) -> dict[str, Any]:
    """Start (or load, when `first` > 0), train `steps` steps, and save; returns losses and the exported
    weights around them.

    `layout`: tensor- and pipeline-parallel size.
    """
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from rlsc_mcore.training.step import Trainer
    from tests.helpers.checkpoints import save_checkpoint

    backend = get_backend()
    tp, pp = layout
    groups = initialize_groups(backend, tp, pp=pp)
    flags = [
        "--parallel.tp",
        str(tp),
        "--parallel.pp",
        str(pp),
        "--model.dtype",
        dtype,
        "--optimizer.distributed",
        str(distributed),
        *FLAGS,
    ]
    trainer = Trainer(tiny_config(folder, flags), Path(folder), backend, groups, load=first == 0)
    if first:
        assert load_checkpoint(find_resumable(Path(run_dir)), trainer).steps_done == first

    def exported() -> dict[str, torch.Tensor]:
        policy = trainer.policy
        tensors = export_weights(
            policy.model_weights, policy.architecture, groups.tp_group, tp, groups.pp_group
        )
        return {name: tensor.clone() for name, tensor in tensors}

    begin = exported()
    losses = []
    for step in range(first, first + steps):
        rollouts = make_rollouts(num_questions=4, num_samples=3, seed=step)
        mine = [rollout for rollout in rollouts if rollout.question_index % groups.dp_size == groups.dp_rank]
        sequences = merge_identical(
            mine, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
        )
        losses.append(trainer.step(pack(sequences, 64, multiple_of=tp), step, len(rollouts)).loss)
    if save:
        save_checkpoint(Path(run_dir), trainer, first + steps, first + steps, "questions", 1)
    return {"begin": begin, "end": exported(), "losses": losses}


# (ranks, (tensor-parallel size, pipeline-parallel size))
LAYOUTS = {
    "tp1": (1, (1, 1)), "tp2": (2, (2, 1)), "tp4": (4, (4, 1)), "dp2": (2, (1, 1)), "dp4": (4, (1, 1)), "tp2dp2": (4, (2, 1)),
    "pp2": (2, (1, 2)), "pp2dp2": (4, (1, 2)), "tp2pp2": (4, (2, 2)),
}  # fmt: skip
QUICK = {
    "tp2": ["tp1", "dp2"], "dp2": ["tp1"], "pp2": ["tp1", "tp2"], "tp2pp2": ["dp2", "pp2"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrote", "readers"),
    list(QUICK.items())
    + [
        pytest.param(wrote, [name for name in LAYOUTS if name != wrote], marks=pytest.mark.slow)
        for wrote in LAYOUTS
    ],
    ids=[*QUICK, *(f"{wrote} to all" for wrote in LAYOUTS)],
)
def test_another_layout_goes_on(tmp_path: Path, wrote: str, readers: list[str]) -> None:
    folder, run_dir = (
        str(make_model_folder(tmp_path / "model", num_kv_heads=4, head_dim=64)),
        str(tmp_path / "run"),
    )
    ranks, layout = LAYOUTS[wrote]
    written = run_ranks(ranks, run_steps, folder, run_dir, layout, 0, 3, True, "float32", True)
    stayed = run_ranks(ranks, run_steps, folder, run_dir, layout, 3, 3, False, "float32", True)
    for name, tensor in written[0]["end"].items():
        assert torch.equal(stayed[0]["begin"][name], tensor), name
    for reader in readers:
        ranks, layout = LAYOUTS[reader]
        for rank in run_ranks(ranks, run_steps, folder, run_dir, layout, 3, 3, False, "float32", True):
            for name, tensor in written[0]["end"].items():
                assert torch.equal(rank["begin"][name], tensor), (reader, name)
            # Three steps on: the moments and their step count came along, or the losses would part.
            assert rank["losses"] == pytest.approx(stayed[0]["losses"], rel=1e-6), reader
            for name, tensor in stayed[0]["end"].items():
                torch.testing.assert_close(
                    rank["end"][name],
                    tensor,
                    rtol=0,
                    atol=1e-6,
                    msg=lambda text, n=name, to=reader: f"{to}: {n}: {text}",
                )


@pytest.mark.parametrize(
    ("dtype", "distributed"), [("bfloat16", True), ("float32", False), ("bfloat16", False)]
)
def test_every_kind_of_optimizer_goes_on_bit_for_bit(tmp_path: Path, dtype: str, distributed: bool) -> None:
    folder, run_dir = str(make_model_folder(tmp_path / "model")), str(tmp_path / "run")
    (whole,) = run_ranks(
        1, run_steps, folder, str(tmp_path / "whole"), (1, 1), 0, 4, False, dtype, distributed
    )
    (first,) = run_ranks(1, run_steps, folder, run_dir, (1, 1), 0, 2, True, dtype, distributed)
    (rest,) = run_ranks(1, run_steps, folder, run_dir, (1, 1), 2, 2, False, dtype, distributed)
    assert first["losses"] + rest["losses"] == whole["losses"]
    for name, tensor in whole["end"].items():
        assert torch.equal(rest["end"][name], tensor), name
