"""optimizer.precision_aware on a CPU, with a stand-in that has the signatures of TransformerEngine's
FusedAdam."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder

FLAGS = ["--model.dtype", "bfloat16", "--optimizer.lr", "1e-3", "--optimizer.eps", "1e-2"]
PRECISION_AWARE = [*FLAGS, "--optimizer.precision-aware", "True"]


def make_trainer(folder: str, tp: int, flags: list[str]) -> Any:
    """A trainer whose Megatron-Core takes the stand-in; only the check for a GPU is left out."""
    from rlsc_mcore.rehearsal.fused_adam import install
    from rlsc_mcore.training import optimizer
    from tests.distributed import test_overlap

    if "--optimizer.precision-aware" in flags:
        from rlsc_mcore.parallel.backend import get_backend

        get_backend()
        install()
        optimizer.check_optimizer = lambda config, backend: None
    return test_overlap.make_trainer(folder, tp, flags)


def one_step(trainer: Any, step: int) -> Any:
    from tests.distributed.test_overlap import make_batches

    batches, count = make_batches(trainer, step, lonely=False)
    return trainer.step(batches, step, count)


def reference_step(folder: str, flags: list[str]) -> dict[str, Any]:
    """One update beside plain arithmetic from the gradients that it was given."""
    from rlsc_mcore.algorithm.objective import WeightedObjective
    from tests.distributed.test_overlap import make_batches

    trainer = make_trainer(folder, 1, flags)
    batches, count = make_batches(trainer, 0, lonely=False)
    before = {weight.name: weight.parameter.detach().float().clone() for weight in trainer.policy.weights}
    trainer.accumulate_gradients(batches, WeightedObjective(trainer.config.algorithm, count))
    gradients = {weight.name: weight.parameter.main_grad.float().clone() for weight in trainer.policy.weights}
    outcome = trainer.step(batches, 0, count)
    return {
        "before": before,
        "gradients": gradients,
        "norm": outcome.grad_norm,
        "updated": outcome.updated,
        "after": {
            weight.name: weight.parameter.detach().float().clone() for weight in trainer.policy.weights
        },
    }


@pytest.mark.parametrize("clip", [0.0, 1e-3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_an_update_is_adamw_of_the_clipped_gradient(tmp_path: Path, clip: float, grad_dtype: str) -> None:
    """Clipping must reach the gradients where this optimizer keeps them: with a small limit the first update
    is far smaller."""
    folder = str(make_model_folder(tmp_path / "model"))
    flags = [
        *PRECISION_AWARE,
        "--optimizer.clip-grad",
        str(clip),
        "--optimizer.grad-dtype",
        grad_dtype,
        "--optimizer.weight-decay",
        "0",
    ]
    (run,) = run_ranks(1, reference_step, folder, flags)
    norm = torch.stack([gradient.norm() for gradient in run["gradients"].values()]).norm().item()
    assert run["updated"] and run["norm"] == pytest.approx(norm, rel=1e-2) and norm > 0.01
    scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    for name, before in run["before"].items():
        gradient = run["gradients"][name] * scale
        expected = before - 1e-3 * gradient / (gradient.abs() + 1e-2)
        torch.testing.assert_close(
            run["after"][name], expected, rtol=1e-2, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def steps(folder: str, flags: list[str], part: int | None) -> dict[str, Any]:
    from rlsc_mcore.rehearsal.fused_adam import FusedAdam
    from rlsc_mcore.training import optimizer

    if part is not None:
        optimizer.step_in_parts.__defaults__ = (part,)
    trainer = make_trainer(folder, 1, flags)
    for step in range(3):
        one_step(trainer, step)
    state = [
        tensor
        for states in trainer.optimizer.chained_optimizers[0].optimizer.state.values()
        for tensor in states.values()
    ]
    return {
        "largest": FusedAdam.largest_part,
        "bytes": sum(trainer.memory()["optimizer"].values()),
        "numel": sum(weight.parameter.numel() for weight in trainer.policy.weights),
        "dtypes": {tensor.dtype for tensor in state},
        "weights": {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights},
        "counts": [group["step"] for group in trainer.optimizer.param_groups],
    }


def test_an_update_in_parts_is_the_same_update(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (whole,) = run_ranks(1, steps, folder, PRECISION_AWARE, 1 << 40)
    (parts,) = run_ranks(1, steps, folder, PRECISION_AWARE, 20_000)
    embedding = max(tensor.numel() for tensor in whole["weights"].values())
    assert parts["largest"] == embedding < whole["largest"] / 2
    assert parts["counts"] == whole["counts"] == [3, 3]
    assert all(torch.equal(tensor, parts["weights"][name]) for name, tensor in whole["weights"].items())


def test_the_state_is_8_bytes_per_parameter(tmp_path: Path) -> None:
    """As `rlsc plan` counts: a float32 master weight and two bfloat16 moments, divided by the data-parallel
    ranks."""
    folder = str(make_model_folder(tmp_path / "model"))
    for rank in run_ranks(2, steps, folder, PRECISION_AWARE, None):
        assert rank["bytes"] == pytest.approx(8 * rank["numel"] / 2, rel=0.02)
        assert rank["dtypes"] == {torch.float32, torch.bfloat16}


def train(folder: str, run_dir: str, tp: int, first: int, last: int, save: bool) -> dict[str, Any]:
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder, tp, [*PRECISION_AWARE, "--optimizer.clip-grad", "0.1"])
    if first:
        load_checkpoint(find_resumable(Path(run_dir)), trainer)
    losses = [one_step(trainer, step).loss for step in range(first, last)]
    if save:
        save_checkpoint(Path(run_dir), trainer, last, last, "questions", 1)
    policy, groups = trainer.policy, trainer.groups
    weights = {
        name: t.clone()
        for name, t in export_weights(policy.weights, policy.architecture, groups.tp_group, groups.tp_size)
    }
    return {"losses": losses, "weights": weights}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder, run_dir = str(make_model_folder(tmp_path / "model")), str(tmp_path / "run")
    whole = run_ranks(2, train, folder, run_dir, 1, 0, 4, False)
    run_ranks(2, train, folder, run_dir, 1, 0, 2, True)
    rest = run_ranks(2, train, folder, run_dir, 1, 2, 4, False)
    for one, other in zip(whole, rest, strict=True):
        assert one["losses"][2:] == other["losses"]
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
    for rank in run_ranks(2, train, folder, run_dir, 2, 2, 4, False):  # on another layout
        assert rank["losses"] == pytest.approx(whole[0]["losses"][2:], rel=2e-2)
