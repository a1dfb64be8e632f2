"""Checkpoints: whole or not there, whatever happens while one is written; damage is found and named."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ConfigError
from rlsc_mcore.model.shape import read_architecture
from rlsc_mcore.planning.memory import checkpoint_bytes, config_layout
from rlsc_mcore.run.folder import find_resumable, latest_checkpoint
from rlsc_mcore.training.checkpoint_files import (
    FORMAT,
    CheckpointError,
    NewerCheckpoint,
    RunState,
    read_common,
    read_metadata,
    read_state,
    verify_files,
    write_manifest,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config


def make_trainer(folder: str, seed: int = 0) -> Any:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    return Trainer(
        tiny_config(folder, ["--optimizer.lr", "1e-2", "--training.seed", str(seed)]),
        Path(folder),
        backend,
        groups,
    )


def train(trainer: Any, step: int) -> float:
    from rlsc_mcore.data.packing import merge_identical, pack

    rollouts = make_rollouts(num_questions=2, num_samples=3, seed=step)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    return trainer.step(pack(sequences, 64), step, len(rollouts)).loss


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}


def save_run(folder: str, run_dir: str, steps: int, keep_last: int) -> dict[str, Any]:
    """Train and save after every step; returns the weights after each, and the loss of one step more."""
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder)
    seen = {}
    for step in range(steps):
        train(trainer, step)
        save_checkpoint(Path(run_dir), trainer, step + 1, step + 1, "questions", keep_last)
        seen[step + 1] = weights(trainer)
    state = torch.random.get_rng_state()
    return {"weights": seen, "next": [train(trainer, steps + i) for i in range(2)], "rng": state}


def load_run(folder: str, run_dir: str) -> dict[str, Any]:
    """Load the last checkpoint into another random model, and train two steps more."""
    from rlsc_mcore.training.checkpoint import load_checkpoint

    trainer = make_trainer(folder, seed=7)
    torch.manual_seed(99)
    state = load_checkpoint(find_resumable(Path(run_dir)), trainer)
    loaded, rng = weights(trainer), torch.random.get_rng_state()
    return {
        "state": state,
        "weights": loaded,
        "next": [train(trainer, state.steps_done + i) for i in range(2)],
        "rng": rng,
    }


def load_message(folder: str, run_dir: str) -> str:
    try:
        load_run(folder, run_dir)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("checkpoint") / "model"))


@pytest.fixture(scope="module")
def saved(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("saved")
    return run_dir, run_ranks(1, save_run, folder, str(run_dir), 3, 2)[0]


@pytest.fixture
def run_dir(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_a_loaded_run_goes_on_bit_for_bit(folder: str, saved: tuple[Path, dict[str, Any]]) -> None:
    run_dir, written = saved
    (loaded,) = run_ranks(1, load_run, folder, str(run_dir))
    assert (
        loaded["state"].steps_done == 3
        and loaded["state"].policy_version == 3
        and loaded["state"].questions == "questions"
    )
    for name, tensor in written["weights"][3].items():
        assert torch.equal(loaded["weights"][name], tensor), name
    assert not torch.equal(
        written["weights"][3]["decoder.final_layernorm.weight"],
        written["weights"][2]["decoder.final_layernorm.weight"],
    )
    assert (
        loaded["next"] == written["next"]
    )  # the second of them depends on the optimizer's moments and step count
    assert torch.equal(loaded["rng"], written["rng"])


def test_only_the_last_are_kept(saved: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = saved
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_000002",
        "step_000003",
    ]
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step_000003"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match="no checkpoint there"):
        find_resumable(tmp_path)


@pytest.mark.parametrize("way", ["bit", "truncated", "removed"])
def test_every_damaged_file_is_named(run_dir: Path, way: str) -> None:
    checkpoint = find_resumable(run_dir)
    verify_files(checkpoint)
    generator = random.Random(0)
    files = sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json")
    assert {".metadata", "common.json", "state.json"} < {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        if way == "bit":
            position = generator.randrange(len(content))
            file.write_bytes(
                content[:position]
                + bytes([content[position] ^ 1 << generator.randrange(8)])
                + content[position + 1 :]
            )
        elif way == "truncated":
            file.write_bytes(content[: generator.randrange(len(content))])
        else:
            file.unlink()
        with pytest.raises(CheckpointError) as error:
            verify_files(checkpoint)
        assert str(error.value) == f"{file}: truncated or altered since it was saved"
        file.write_bytes(content)
    verify_files(checkpoint)


def test_a_damaged_checkpoint_does_not_load(folder: str, run_dir: Path) -> None:
    file = max(find_resumable(run_dir).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    (message,) = run_ranks(1, load_message, folder, str(run_dir))
    assert message == f"{file}: truncated or altered since it was saved"


@pytest.mark.parametrize(("name", "reader"), [("manifest.json", verify_files), ("state.json", read_state)])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": 1}'])
def test_unreadable_facts_are_named(run_dir: Path, name: str, reader: Any, content: str | None) -> None:
    file = find_resumable(run_dir) / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"not readable|truncated or altered"):
        reader(file.parent)


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class _Global:
    """Pickles as one named global, called with arguments."""

    def __init__(self, module: str, name: str, *arguments: str) -> None:
        texts = [module, name, *arguments]
        short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in texts]
        self.pickled = b"\x80\x04" + short[0] + short[1] + b"\x93" + b"(" + b"".join(short[2:]) + b"tR."


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (lambda w: pickle.dumps(_Runs(os.mkdir, w)), "posix.mkdir"),
        (lambda w: pickle.dumps(_Runs(eval, f"__import__('os').mkdir({w!r})")), "eval"),
        (
            lambda w: _Global("torch.distributed.checkpoint.filesystem", "os.mkdir", w).pickled,
            "filesystem.os.mkdir",
        ),
        (
            lambda w: _Global("torch.distributed.checkpoint.metadata", "os.mkdir", w).pickled,
            "metadata.os.mkdir",
        ),
        (
            lambda w: _Global("torch.distributed.checkpoint.filesystem", "FileSystemWriter", w).pickled,
            "FileSystemWriter",
        ),
        (lambda w: _Global("torch", "load", w).pickled, "torch.load"),
        (lambda w: b"", "Ran out of input"),
        (lambda w: b"\x80\x04garbage", ""),
        (lambda w: pickle.dumps({"a": 1}), ""),
    ],
    ids=["mkdir", "eval", "dotted", "dotted metadata", "writer", "torch.load", "empty", "garbage", "dict"],
)
def test_a_foreign_pickle_is_refused_before_it_runs(tmp_path: Path, pickled: Any, named: str) -> None:
    witness = tmp_path / "witness"
    file = tmp_path / ".metadata"
    file.write_bytes(pickled(str(witness)))
    with pytest.raises(CheckpointError) as error:
        read_metadata(file)
    assert str(error.value).startswith(f"{file}: not a checkpoint's metadata: ") and named in str(error.value)
    assert not witness.exists()


def test_our_own_metadata_is_accepted(saved: tuple[Path, dict[str, Any]]) -> None:
    read_metadata(find_resumable(saved[0]) / ".metadata")


def save_for_ever(folder: str, run_dir: str, started: Any) -> None:
    from tests.helpers.checkpoints import save_checkpoint

    os.environ.pop("RANK", None)
    trainer = make_trainer(folder)
    started.set()
    for step in range(100_000):
        save_checkpoint(Path(run_dir), trainer, step + 1, step + 1, "questions", 1)


def test_kill_9_while_saving_leaves_a_whole_checkpoint(folder: str, tmp_path: Path) -> None:
    """Killed at random moments of a process that does nothing but save, again and again in the same
    folder."""
    context = multiprocessing.get_context("forkserver")
    generator = random.Random(0)
    for _ in range(5):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(folder, str(tmp_path), started))
        process.start()
        assert started.wait(60)
        limit = time.monotonic() + 60
        while latest_checkpoint(tmp_path) is None or read_state(find_resumable(tmp_path)).steps_done < 1:
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.4))
        process.kill()
        process.join()
        checkpoint = find_resumable(tmp_path)
        verify_files(checkpoint)
        assert read_state(checkpoint).steps_done == int(checkpoint.name.removeprefix("step_"))
    (loaded,) = run_ranks(1, load_run, folder, str(tmp_path))
    assert loaded["state"].steps_done == read_state(find_resumable(tmp_path)).steps_done


def save_on_a_full_disk(folder: str, run_dir: str, largest_bytes: int) -> tuple[str, list[str]]:
    """Save one checkpoint, then another with files limited to `largest_bytes`: the message and what is
    left."""
    from tests.helpers.checkpoints import save_checkpoint

    trainer = make_trainer(folder)
    save_checkpoint(Path(run_dir), trainer, 1, 1, "questions", 2)
    train(trainer, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, resource.RLIM_INFINITY))
    message = ""
    try:
        save_checkpoint(Path(run_dir), trainer, 2, 2, "questions", 2)
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
    save_checkpoint(
        Path(run_dir), trainer, 2, 2, "questions", 2
    )  # the same run can save again once there is room
    return message, left


@pytest.mark.parametrize("largest_bytes", [1, 3000, 100_000])
def test_a_full_disk_stops_the_save_and_keeps_the_old_checkpoint(
    folder: str, tmp_path: Path, largest_bytes: int
) -> None:
    ((message, left),) = run_ranks(1, save_on_a_full_disk, folder, str(tmp_path), largest_bytes, timeout=60)
    assert message.startswith(f"checkpoint of step 2 not saved to {tmp_path / 'checkpoints'}: ")
    assert message.endswith("; the previous checkpoint is whole") and "\n" not in message
    assert left == ["latest", "step_000001"]
    assert read_state(find_resumable(tmp_path)).steps_done == 2
    verify_files(find_resumable(tmp_path))
    verify_files(tmp_path / "checkpoints" / "step_000001")


def test_state_is_json(saved: tuple[Path, dict[str, Any]]) -> None:
    checkpoint = find_resumable(saved[0])
    written = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    assert written.pop("format") == FORMAT and RunState(**written) == read_state(checkpoint)
    assert sorted(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))) == sorted(
        path.name for path in checkpoint.iterdir() if path.name != "manifest.json"
    )


def test_a_checkpoint_has_the_size_that_the_launch_checks_expect(
    folder: str, saved: tuple[Path, dict[str, Any]]
) -> None:
    config = tiny_config(folder)
    expected = checkpoint_bytes(read_architecture(Path(folder)), config_layout(config, 1, 1))
    tensors = find_resumable(saved[0]).glob("*.distcp")
    size = sum(file.stat().st_size for file in tensors)
    assert expected < size < 1.05 * expected + 100_000  # each tensor has a header


def test_the_state_of_an_older_format_is_read(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    expected = read_state(find_resumable(saved[0]))
    older = {**vars(expected), "step": expected.steps_done}
    del older["steps_done"]
    for mark in ({}, {"format": 2}):
        (tmp_path / "state.json").write_text(json.dumps({**mark, **older}), encoding="utf-8")
        assert read_state(tmp_path) == expected
    (tmp_path / "state.json").write_text(json.dumps({"format": 3, **older}), encoding="utf-8")
    with pytest.raises(NewerCheckpoint, match="with step"):
        read_state(tmp_path)


# ------------------------------------------------------------------ what is no damage, and what is


def resume_run(folder: str, run_dir: str) -> tuple[int, list[str]]:
    """Resume as a run does: the step that it went on from, and what it warned of."""
    from rlsc_mcore.training.resume import resume

    told: list[str] = []
    state = resume(find_resumable(Path(run_dir)), make_trainer(folder, seed=7), told.append)
    return state.steps_done, told


@pytest.mark.parametrize(
    "content", [b"step_000099\n", b"", b"\0\0", b"\xff\xfe", b"../../etc", None], ids=str
)
def test_latest_is_a_hint(run_dir: Path, content: bytes | None) -> None:
    pointer = run_dir / "checkpoints" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert find_resumable(run_dir).name == "step_000003" and latest_checkpoint(run_dir) == find_resumable(
        run_dir
    )


def test_a_newer_checkpoint_than_latest_says_is_used(run_dir: Path) -> None:
    """A kill between the checkpoint's rename and that of the pointer."""
    (run_dir / "checkpoints" / "latest").write_text("step_000002\n")
    assert find_resumable(run_dir).name == "step_000003"


def test_steps_are_compared_as_numbers(run_dir: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step_000003", run_dir / "checkpoints" / "step_1000000")
    shutil.copytree(run_dir / "checkpoints" / "step_000003", run_dir / "checkpoints" / "step_999999")
    for name in (
        "step_x",
        "step_000009.partial",
        "step_000009.damaged",
        "step_000009.bak",
        "step_-00009",
        "step_9",
    ):
        (run_dir / "checkpoints" / name).mkdir()
    (run_dir / "checkpoints" / "step_2000000").write_text("a file")
    assert find_resumable(run_dir).name == "step_1000000"


def test_stray_files_are_no_damage(folder: str, run_dir: Path) -> None:
    checkpoint = find_resumable(run_dir)
    (checkpoint / ".nfs0000001").write_bytes(b"open elsewhere")
    (checkpoint / ".snapshot").mkdir()
    (checkpoint / ".snapshot" / "state.json").write_text("{}")
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / "__9_9.distcp").write_bytes(b"named by nobody")
    (checkpoint / "common.pt").write_bytes(pickle.dumps(_Runs(os.mkdir, str(run_dir / "witness"))))
    verify_files(checkpoint)
    assert run_ranks(1, resume_run, folder, str(run_dir)) == [(3, [])]
    assert not (run_dir / "witness").exists()


def alter(checkpoint: Path, name: str, content: bytes) -> None:
    """Write a file and a manifest that fits it: what no digest can find."""
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.json",
            b'{"sharded_backend": "zarr", "sharded_backend_version": 9, "common_backend": "torch"}',
        ),
        ("metadata.json", b"{"),
        ("common.json", b"[]"),
        ("common.json", b'{"dataclass": ["os", "system", {}]}'),
        ("common.json", b'{"map": [["optimizer", 3]]}'),
        (".metadata", pickle.dumps({"a": 1})),
        ("state.json", b'{"step": -1, "policy_version": 3, "questions": "", "torch_rng": ""}'),
        ("state.json", b'{"step": "3", "policy_version": 3, "questions": "", "torch_rng": ""}'),
        ("state.json", b'{"step": 3, "policy_version": true, "questions": "", "torch_rng": ""}'),
        (
            "state.json",
            b'{"format": 2, "step": 3, "policy_version": 3, "questions": "", "torch_rng": "AAAA"}',
        ),
        ("state.json", b'{"format": "2", "step": 3}'),
    ],
)
def test_what_does_not_load_is_set_aside_though_the_manifest_fits(
    folder: str, run_dir: Path, name: str, content: bytes
) -> None:
    checkpoint = find_resumable(run_dir)
    alter(checkpoint, name, content)
    ((step, told),) = run_ranks(1, resume_run, folder, str(run_dir))
    assert step == 2 and len(told) == 1 and "\n" not in told[0] and "going on from" in told[0]
    assert checkpoint.with_name("step_000003.damaged").is_dir() and not checkpoint.exists()


@pytest.mark.parametrize(
    "change", [{"format": 4}, {"reward_model": "x"}, {"format": 99, "extra": 1}], ids=str
)
def test_a_newer_version_s_checkpoint_is_left_alone(
    folder: str, run_dir: Path, change: dict[str, Any]
) -> None:
    checkpoint = find_resumable(run_dir)
    facts = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    alter(checkpoint, "state.json", json.dumps(facts | change).encode())
    with pytest.raises(
        NewerCheckpoint, match=r"was written by a newer version of rlsc_mcore .*left as it is"
    ):
        read_state(checkpoint)
    with pytest.raises(RuntimeError, match="NewerCheckpoint"):
        run_ranks(1, resume_run, folder, str(run_dir))
    assert checkpoint.is_dir()


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlsc_mcore.training import checkpoint_files

    def denied(file: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checkpoint_files, "digest", denied)
    with pytest.raises(checkpoint_files.UnreadableCheckpoint, match="permission denied"):
        verify_files(find_resumable(run_dir))


def resume_with_torch_s_escape(folder: str, run_dir: str) -> tuple[int, list[str]]:
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return resume_run(folder, run_dir)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "shard"])
def test_nothing_is_unpickled_whatever_torch_s_environment_says(
    folder: str, run_dir: Path, name: str
) -> None:
    """A hostile file with a fitting manifest, where a usual workaround has turned torch's own protection
    off."""
    witness, checkpoint = run_dir / "witness", find_resumable(run_dir)
    hostile = pickle.dumps(_Runs(os.mkdir, str(witness)))
    if name == "common.pt":
        (checkpoint / "common.json").unlink()  # as in a checkpoint of format 1
    if name == "shard":
        name = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size).name
        hostile = hostile.ljust((checkpoint / name).stat().st_size, b"\0")
    alter(checkpoint, name, hostile)
    ((step, told),) = run_ranks(1, resume_with_torch_s_escape, folder, str(run_dir))
    assert step == 2 and len(told) == 1 and not witness.exists()


def test_small_values_are_json(saved: tuple[Path, dict[str, Any]]) -> None:
    checkpoint = find_resumable(saved[0])
    written = json.loads((checkpoint / "common.json").read_text(encoding="utf-8"))
    values = read_common(checkpoint)
    assert "betas" in json.dumps(written) and "(0.9, 0.999)" in repr(values)  # a tuple, as it was
    assert not (checkpoint / "common.pt").exists()
