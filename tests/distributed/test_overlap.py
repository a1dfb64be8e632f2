"""Overlapped reduction and gathering change nothing: several buckets, several micro-batches, ranks without a
sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

OVERLAP = ["--parallel.overlap-grad-reduce", "True", "--parallel.bucket-size", "30000"]
GATHER = [*OVERLAP, "--parallel.overlap-param-gather", "True"]
UPDATES = ["--training.updates-per-rollout", "2"]


def make_trainer(folder: str, tp: int, flags: list[str]) -> Any:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    # Without clipping: the norm is summed shard by shard, in another order for other buckets.
    options = [
        "--parallel.tp",
        str(tp),
        "--optimizer.lr",
        "1e-3",
        "--optimizer.eps",
        "1e-2",
        "--optimizer.clip-grad",
        "0",
        *flags,
    ]
    return Trainer(tiny_config(folder, options), Path(folder), backend, groups)


def make_batches(trainer: Any, step: int, lonely: bool) -> tuple[list[Any], int]:
    """This rank's micro-batches of a step; with `lonely`, data-parallel rank 0 has all of them."""
    from rlsc_mcore.data.packing import merge_identical, pack

    groups = trainer.groups
    rollouts = make_rollouts(num_questions=4, num_samples=3, seed=step)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    mine = sequences[groups.dp_rank :: groups.dp_size]
    if lonely:
        mine = sequences if groups.dp_rank == 0 else []
    return pack(mine, 48, multiple_of=trainer.token_multiple), len(rollouts)


def train(folder: str, tp: int, flags: list[str], lonely: bool, steps: int = 3) -> dict[str, Any]:
    trainer = make_trainer(folder, tp, flags)
    outcomes = []
    for step in range(steps):
        batches, count = make_batches(trainer, step, lonely)
        outcomes.append(trainer.step(batches, step, count))
    (buffer,) = trainer.ddp.buffers
    return {
        "losses": [update.loss for outcome in outcomes for update in outcome.updates],
        "grad_norms": [update.grad_norm for outcome in outcomes for update in outcome.updates],
        "weights": {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights},
        "num_buckets": len(buffer.buckets),
    }


@pytest.mark.parametrize("lonely", [False, True], ids=["all ranks", "one rank has all"])
@pytest.mark.parametrize(
    ("flags", "tied"),
    [(OVERLAP, True), (GATHER, True), (GATHER, False)],
    ids=["reduce", "gather", "gather untied"],
)
def test_overlap_equals_none_bit_for_bit(tmp_path: Path, flags: list[str], tied: bool, lonely: bool) -> None:
    folder = str(make_model_folder(tmp_path / "model", tied=tied))
    plain = run_ranks(2, train, folder, 1, UPDATES, lonely)
    overlapped = run_ranks(2, train, folder, 1, [*UPDATES, *flags], lonely)
    assert plain[0]["num_buckets"] == 1 and overlapped[0]["num_buckets"] > 3
    for before, after in zip(plain, overlapped, strict=True):
        assert after["losses"] == before["losses"] and after["grad_norms"] == pytest.approx(
            before["grad_norms"], rel=1e-6
        )
        for name, tensor in before["weights"].items():
            # Right after the step, on every rank: no parameter may be stale when the engine reads it.
            assert torch.equal(after["weights"][name], tensor), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_overlap_under_tensor_parallelism(tmp_path: Path, recompute: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (alone,) = run_ranks(1, train, folder, 1, [], False)
    ranks = run_ranks(4, train, folder, 2, [*GATHER, "--training.recompute", recompute], False)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)


def test_bfloat16_with_fp32_masters_and_overlap(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (alone,) = run_ranks(1, train, folder, 1, ["--model.dtype", "bfloat16"], False)
    ranks = run_ranks(2, train, folder, 1, ["--model.dtype", "bfloat16", *GATHER], False)
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(alone["losses"], rel=2e-2)
    for name, tensor in ranks[0]["weights"].items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, ranks[1]["weights"][name]), name


def save(folder: str, run_dir: str, flags: list[str]) -> dict[str, torch.Tensor]:
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder, 1, flags)
    for step in range(2):
        trainer.step(*_arguments(trainer, step))
    save_checkpoint(Path(run_dir), trainer, 2, 2, "questions", 1)
    return continue_run(trainer)


def load(folder: str, run_dir: str, flags: list[str]) -> dict[str, torch.Tensor]:
    from rlsc_mcore.run.folder import find_resumable
    from rlsc_mcore.training.checkpoint import load_checkpoint

    trainer = make_trainer(folder, 1, flags)
    load_checkpoint(find_resumable(Path(run_dir)), trainer)
    return continue_run(trainer)


def continue_run(trainer: Any) -> dict[str, torch.Tensor]:
    """Two steps more: the second depends on the moments."""
    for step in (2, 3):
        trainer.step(*_arguments(trainer, step))
    return {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}


def _arguments(trainer: Any, step: int) -> tuple[Any, int, int]:
    batches, count = make_batches(trainer, step, False)
    return batches, step, count


@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [(GATHER, GATHER), (GATHER, []), ([], GATHER)],
    ids=["same", "to none", "from none"],
)
def test_a_checkpoint_of_several_whole_buckets_loads_in_any_layout(
    tmp_path: Path, saved_with: list[str], loaded_with: list[str]
) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    written = run_ranks(2, save, folder, str(tmp_path), saved_with)
    loaded = run_ranks(2, load, folder, str(tmp_path), loaded_with)
    for name, tensor in written[0].items():
        assert torch.equal(loaded[0][name], tensor), name


def refusal(folder: str, flags: list[str]) -> str:
    try:
        make_trainer(folder, 1, flags)
    except ConfigError as error:
        return str(error)
    return ""


def padding(folder: str, flags: list[str]) -> list[int]:
    buckets = [bucket for buffer in make_trainer(folder, 1, flags).ddp.buffers for bucket in buffer.buckets]
    return [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets]


@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [(GATHER, GATHER), (GATHER, []), ([], GATHER)],
    ids=["same", "to none", "from none"],
)
def test_a_checkpoint_of_padded_buckets_loads_in_any_layout(
    tmp_path: Path, saved_with: list[str], loaded_with: list[str]
) -> None:
    """Trap 2: hidden size 96 makes several padded buckets, which Megatron-Core 0.16.1's own resharding format
    corrupts."""
    folder = str(make_model_folder(tmp_path / "model", head_dim=24))
    assert sum(amount > 0 for amount in run_ranks(2, padding, folder, GATHER)[0]) > 1
    written = run_ranks(2, save, folder, str(tmp_path), saved_with)
    loaded = run_ranks(2, load, folder, str(tmp_path), loaded_with)
    for name, tensor in written[0].items():
        assert torch.equal(loaded[0][name], tensor), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.cpu-offload", "0.5"], "optimizer.cpu_offload: there is no GPU"),
        (
            ["--optimizer.precision-aware", "True", "--model.dtype", "bfloat16"],
            "optimizer.precision_aware: it needs TransformerEngine's",
        ),
        (["--model.fp8", "hybrid"], "model.fp8: hybrid needs an NVIDIA GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(tmp_path: Path, flags: list[str], said: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    (message,) = run_ranks(1, refusal, str(make_model_folder(tmp_path / "model")), flags)
    assert message.startswith(said) and "\n" not in message
