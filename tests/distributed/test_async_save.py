"""Saving beside the training: the state of the moment of the call, `latest` only when every rank has written,
failures told."""

import multiprocessing
import random
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.run.folder import find_resumable, latest_checkpoint
from rlsc_mcore.training.checkpoint_files import CheckpointError, best_checkpoint, read_state, verify_files
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config


def make_trainer(folder: str, tp: int = 1, seed: int = 0) -> Any:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp)
    flags = ["--optimizer.lr", "1e-2", "--parallel.tp", str(tp), "--training.seed", str(seed)]
    return Trainer(tiny_config(folder, flags), Path(folder), backend, groups)


def train(trainer: Any, step: int) -> float:
    from rlsc_mcore.data.packing import merge_identical, pack

    groups = trainer.groups
    rollouts = make_rollouts(num_questions=2, num_samples=3, seed=step)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], 64, multiple_of=groups.tp_size)
    return trainer.step(batches, step, len(rollouts)).loss


def make_saver(run_dir: str, trainer: Any, **options: Any) -> Any:
    from rlsc_mcore.training.checkpoint import CheckpointSaver

    return CheckpointSaver(
        Path(run_dir), trainer, "questions", **{"keep_last": 2, "asynchronous": True, **options}
    )


def save_while_training(folder: str, run_dir: str, tp: int, asynchronous: bool) -> dict[str, Any]:
    """Save after two steps and train on at once; then what an uninterrupted run does next."""
    trainer = make_trainer(folder, tp)
    saver = make_saver(run_dir, trainer, asynchronous=asynchronous)
    for step in range(2):
        train(trainer, step)
    weights = {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}
    saver.save(2, 2)
    following = [train(trainer, step) for step in (2, 3, 4)]
    saver.finish()
    return {"weights": weights, "next": following}


def load(folder: str, run_dir: str, tp: int) -> dict[str, Any]:
    from rlsc_mcore.training.checkpoint import load_checkpoint

    trainer = make_trainer(folder, tp, seed=5)
    state = load_checkpoint(find_resumable(Path(run_dir)), trainer)
    weights = {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}
    return {
        "step": state.steps_done,
        "weights": weights,
        "next": [train(trainer, step) for step in (2, 3, 4)],
    }


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 1), (2, 2)], ids=["alone", "dp2", "tp2"])
def test_what_is_saved_is_the_state_of_the_call(tmp_path: Path, world: int, tp: int) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    written = run_ranks(world, save_while_training, folder, str(tmp_path / "beside"), tp, True)
    verify_files(find_resumable(tmp_path / "beside"))
    for before, after in zip(
        written, run_ranks(world, load, folder, str(tmp_path / "beside"), tp), strict=True
    ):
        assert after["step"] == 2 and after["next"] == before["next"]
        for name, tensor in before["weights"].items():
            assert torch.equal(after["weights"][name], tensor), name
    run_ranks(world, save_while_training, folder, str(tmp_path / "waiting"), tp, False)
    names = {
        run: sorted(file.name for file in find_resumable(tmp_path / run).iterdir())
        for run in ("beside", "waiting")
    }
    assert names["beside"] == names["waiting"]


def slow_rank(folder: str, run_dir: str) -> list[str | None]:
    """What `latest` names while rank 1 still writes, after polls, and in the end."""
    from rlsc_mcore.training import checkpoint

    trainer = make_trainer(folder, tp=2)
    saver = make_saver(run_dir, trainer)
    saver.save(1, 1)
    saver.finish()
    release, plain = threading.Event(), checkpoint.digest
    if trainer.groups.rank == 1:

        def late(file: Path) -> dict[str, Any]:
            release.wait(60)
            return plain(file)

        checkpoint.digest = late
    train(trainer, 0)
    saver.save(2, 2)
    seen = []
    for _ in range(3):
        saver.poll()
        seen.append(_latest(run_dir))
    release.set()
    saver.finish()
    seen.append(_latest(run_dir))
    return seen


def _latest(run_dir: str) -> str | None:
    checkpoint = latest_checkpoint(Path(run_dir))
    return None if checkpoint is None else checkpoint.name


def test_latest_moves_when_every_rank_has_written(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    main, _ = run_ranks(2, slow_rank, folder, str(tmp_path))
    assert main == ["step_000001"] * 3 + ["step_000002"]


def disk_full_on_one_rank(folder: str, run_dir: str, asynchronous: bool) -> tuple[str, list[str]]:
    trainer = make_trainer(folder, tp=2)
    saver = make_saver(run_dir, trainer, asynchronous=asynchronous)
    saver.save(1, 1)
    saver.finish()
    train(trainer, 0)
    if trainer.groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    message = ""
    try:
        saver.save(2, 2)
        saver.finish()
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer.groups.barrier()
    left = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
    trainer.groups.barrier()
    saver.save(2, 2)
    saver.finish()
    return message, left


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside", "waiting"])
def test_a_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(
    tmp_path: Path, asynchronous: bool
) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    ranks = run_ranks(2, disk_full_on_one_rank, folder, str(tmp_path), asynchronous)
    assert ranks[0][0] == ranks[1][0]
    for message, left in ranks:
        assert message.startswith("checkpoint of step 2 not saved to") and message.endswith(
            "the previous checkpoint is whole"
        )
        assert ": rank 1: " in message and "\n" not in message
        assert left == ["latest", "step_000001"]
    assert _latest(str(tmp_path)) == "step_000002"
    verify_files(find_resumable(tmp_path))


def main_rank_cannot_write(folder: str, run_dir: str, where: str) -> tuple[str, float, list[str]]:
    """What a rank hears, and after how many seconds, when rank 0 alone fails at one of the files that it
    alone writes."""
    trainer = make_trainer(folder, tp=2)
    saver = make_saver(run_dir, trainer, asynchronous=where == "metadata")
    checkpoints, is_main = Path(run_dir) / "checkpoints", trainer.groups.is_main
    if where != "folder":
        saver.save(1, 1)
        saver.finish()
        train(trainer, 0)
    no_files = (0, resource.RLIM_INFINITY)
    if is_main and where == "folder":
        checkpoints.write_text("no folder", encoding="utf-8")
    if is_main and where == "common":
        resource.setrlimit(resource.RLIMIT_FSIZE, no_files)
    if is_main and where == "pointer":
        (checkpoints / "latest.partial").mkdir()
    trainer.groups.barrier()
    message, begin = "", time.monotonic()
    try:
        saver.save(2, 2)
        if where == "metadata":
            saver._save.thread.join()
            if is_main:
                resource.setrlimit(resource.RLIMIT_FSIZE, no_files)
            saver.finish()
    except CheckpointError as error:
        message = str(error)
    seconds = time.monotonic() - begin
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if is_main and where == "folder":
        checkpoints.unlink()
    if is_main and where == "pointer":
        (checkpoints / "latest.partial").rmdir()
    trainer.groups.barrier()
    left = sorted(path.name for path in checkpoints.glob("*.partial"))
    trainer.groups.barrier()
    saver.save(3, 3)
    saver.finish()
    return message, seconds, left


@pytest.mark.parametrize("where", ["folder", "common", "metadata", "pointer"])
def test_what_only_the_main_rank_writes_fails_on_all_at_once(tmp_path: Path, where: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (main, *_), (other, *_) = ranks = run_ranks(2, main_rank_cannot_write, folder, str(tmp_path), where)
    assert main == other and main.startswith(
        f"checkpoint of step 2 not saved to {tmp_path}/checkpoints: rank 0: "
    ), main
    assert "\n" not in main
    assert [left for _, _, left in ranks] == [[], []]
    assert max(seconds for _, seconds, _ in ranks) < 30
    assert _latest(str(tmp_path)) == "step_000003"
    verify_files(find_resumable(tmp_path))


def save_for_ever(folder: str, run_dir: str, started: Any) -> None:
    import os

    os.environ.pop("RANK", None)
    trainer = make_trainer(folder)
    saver = make_saver(run_dir, trainer, keep_last=1)
    started.set()
    for step in range(100_000):
        saver.save(step + 1, step + 1)
        train(trainer, step)
        saver.poll()


def test_kill_9_beside_the_training_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    context = multiprocessing.get_context("forkserver")
    generator = random.Random(1)
    for _ in range(4):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(folder, str(tmp_path), started))
        process.start()
        assert started.wait(60)
        limit = time.monotonic() + 60
        while latest_checkpoint(tmp_path) is None:
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.5))
        process.kill()
        process.join()
        verify_files(find_resumable(tmp_path))


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    (kept,) = run_ranks(1, save_with_scores, folder, str(tmp_path))
    assert kept == {
        1: ["latest", "step_000001"],
        2: ["best", "latest", "step_000001", "step_000002"],
        3: ["best", "latest", "step_000002", "step_000003"],
        4: ["best", "latest", "step_000002", "step_000004"],
        5: ["best", "latest", "step_000002", "step_000005"],
    }
    assert (tmp_path / "checkpoints" / "best").read_text(encoding="utf-8") == "step_000002\n"
    assert best_checkpoint(tmp_path / "checkpoints", {9: 1.0}) is None


def save_with_scores(folder: str, run_dir: str) -> dict[int, list[str]]:
    """Each checkpoint is judged by the step after it: weights of steps 1 to 4 score these."""
    measured = {0: 9.0, 1: 0.1, 2: 0.7, 3: 0.3, 4: 0.2}
    trainer = make_trainer(folder)
    saver = make_saver(run_dir, trainer, keep_last=1, keep_best=True, asynchronous=False)
    kept = {}
    for step in range(1, 6):
        train(trainer, step)
        saver.save(step, step, {s: score for s, score in measured.items() if s < step})
        kept[step] = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
    return kept


def save_and_tell(folder: str, run_dir: str) -> dict[int, dict[str, torch.Tensor]]:
    """Save three steps, of which the second scores best; returns the weights of each."""
    from rlsc_mcore.config_file import dump_config
    from rlsc_mcore.model.weight_map import export_weights

    trainer = make_trainer(folder)
    Path(run_dir, "config.yaml").write_text(dump_config(trainer.config), encoding="utf-8")
    saver = make_saver(run_dir, trainer, keep_last=2, keep_best=True, asynchronous=False)
    weights = {}
    for step in (1, 2, 3):
        train(trainer, step)
        policy = trainer.policy
        exported = export_weights(policy.weights, policy.architecture, trainer.groups.tp_group, 1)
        weights[step] = {name: tensor.clone() for name, tensor in exported}
        saver.save(step, step, {s: score for s, score in {1: 0.1, 2: 0.7}.items() if s < step})
    return weights


def export(run_dir: str, output: str, checkpoint: str) -> str:
    from rlsc_mcore.training.export import export_run

    return export_run(Path(run_dir), Path(output), checkpoint).name


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 2), ("latest", 3), ("2", 2)])
def test_any_checkpoint_that_is_kept_is_exported(tmp_path: Path, checkpoint: str, step: int) -> None:
    from safetensors.torch import load_file

    folder = str(make_model_folder(tmp_path / "model"))
    (weights,) = run_ranks(1, save_and_tell, folder, str(tmp_path))
    assert run_ranks(1, export, str(tmp_path), str(tmp_path / "out"), checkpoint) == [f"step_{step:06d}"]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights[step].keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights[step].items())


def go_on(folder: str, run_dir: str) -> tuple[int | str, list[str]]:
    from rlsc_mcore.training.resume import resume

    trainer = make_trainer(folder, seed=3)
    said: list[str] = []
    try:
        return resume(find_resumable(Path(run_dir)), trainer, said.append).steps_done, said
    except CheckpointError as error:
        return str(error), said


def save_three(folder: str, run_dir: str) -> None:
    trainer = make_trainer(folder)
    saver = make_saver(run_dir, trainer, keep_last=3)
    for step in (1, 2, 3):
        train(trainer, step)
        saver.save(step, step)
    saver.finish()


@pytest.mark.parametrize("way", ["bit", "truncated", "removed"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, way: str) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    run_ranks(2, save_three, folder, str(tmp_path / "run"))
    checkpoints = tmp_path / "run" / "checkpoints"
    for damaged, expected in (("step_000003", 2), ("step_000002", 1), ("step_000001", None)):
        file = max((checkpoints / damaged).glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        if way == "bit":
            content[len(content) // 3] ^= 16
            file.write_bytes(content)
        elif way == "truncated":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()
        for rank, (found, said) in enumerate(run_ranks(2, go_on, folder, str(tmp_path / "run"))):
            told = f"{file}: truncated or altered since it was saved"
            if expected is None:
                assert (found, said) == (told, [])
            else:
                assert found == expected and said == [
                    f"{told}; going on from {checkpoints / f'step_{expected:06d}'} instead"
                ], rank
                assert (checkpoints / f"{damaged}.damaged").is_dir() and not (checkpoints / damaged).exists()
    assert read_state(checkpoints / "step_000001").steps_done == 1
    shutil.rmtree(checkpoints)
