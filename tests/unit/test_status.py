"""status.json as the trainer writes it, and `rlsc status` as a login node reads it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsc_mcore.commands.status import describe, run_status
from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.owner import FolderLost, owned
from rlsc_mcore.run.progress import duration
from rlsc_mcore.run.status import RunStatus, read_status, recorded_end, write_end

NOW = 2_000_000_000.0


def write_run(folder: Path, **status: object) -> Path:
    facts = {
        "state": "running",
        "phase": "rollout",
        "steps_done": 2,
        "num_steps": 10,
        "tokens": 0,
        "updated": NOW - 5,
        "phase_since": NOW - 15,
    }
    (folder / "status.json").write_text(json.dumps({**facts, **status}))
    rows = [
        {
            "step": step,
            "seconds": {"rollout": 20.0, "train": 10.0},
            "loss": 0.5,
            "f_estimate": 0.25,
            "mean_length": 300.0,
            "rollout_tokens_per_s": 4000.0,
            "train_tokens_per_s": 9000.0,
        }
        for step in range(2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 2, "loss": ')  # being written
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (NOW - 60, NOW - 60))
    (folder / "checkpoints" / "latest").write_text("step_000002\n")
    for attempt in ("7.0", "7.1"):
        (folder / "logs" / attempt).mkdir(parents=True)
    (folder / "logs" / "latest").symlink_to("7.1")
    return folder


def test_a_running_run_is_described_from_its_files(tmp_path: Path) -> None:
    facts = describe(write_run(tmp_path, tokens=1000, job="7", attempt=1, host="n1"), now=NOW)
    assert facts == {
        "state": "running",
        "phase": "rollout, for 15 s",
        "steps_done": "2 of 10",
        "sampled": "1000 tokens of finished answers, 100 tokens/s",
        "speed": "rollout 4000 tokens/s, training 9000 tokens/s",
        "time_left": "about 4 min (30.0 s per step)",
        "last_step": "loss 0.5000, F 0.2500, mean length 300.0",
        "checkpoint": "step_000002, 60 s ago",
        "restarts": "1",
        "job": "7, attempt 1, main rank on n1",
    }


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"state": "stopped", "signal": "SIGUSR1"}, "stopped by SIGUSR1, saved"),
        ({"state": "crash", "message": "RuntimeError: broken"}, "crash: RuntimeError: broken"),
        ({"state": "done"}, "done"),
    ],
)
def test_an_ended_run_says_how(tmp_path: Path, status: dict[str, str], expected: str) -> None:
    facts = describe(write_run(tmp_path, **status), now=NOW)
    assert facts["state"] == expected and "time_left" not in facts and facts["ended"] == "5 s ago, in rollout"


def test_a_silent_run_is_doubted(tmp_path: Path) -> None:
    assert (
        "no news for 3 h 0 min: its job may be gone"
        in describe(write_run(tmp_path, updated=NOW - 3 * 3600), now=NOW)["phase"]
    )


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run there; expected .*status\.json"):
        describe(tmp_path, now=NOW)


def test_the_exit_code_tells_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_status([str(write_run(tmp_path, state="crash"))]) == 1
    assert run_status([str(tmp_path), "--json"]) == 1
    assert '"restarts": "1"' in capsys.readouterr().out


def test_status_answers_at_once_and_needs_no_torch(tmp_path: Path) -> None:
    """The command as a user gives it; processor time, since a busy machine makes everything late."""
    program = f"""
import resource, sys
from rlsc_mcore import cli
try:
    cli.main(["status", {str(write_run(tmp_path))!r}])
except SystemExit as end:
    assert not end.code
usage = resource.getrusage(resource.RUSAGE_SELF)
print("heavy", *({{"torch", "vllm", "megatron", "transformers"}} & sys.modules.keys()))
print("seconds", usage.ru_utime + usage.ru_stime)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    assert "state        running" in done.stdout and "\nheavy\n" in done.stdout
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (42.4, "42 s"), (119, "119 s"), (120, "2 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------ written by the trainer


def test_phases_and_tokens_are_written_whole(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, 10, enabled=True)
    assert (read_status(tmp_path) or {})["phase"] == "start-up"
    status.enter("rollout", 3)
    status._counted = 0.0  # the last count was written long ago
    status.count_tokens(5)
    assert (read_status(tmp_path) or {})["tokens"] == 5
    status.enter("train", 3)
    assert {"state": "running", "phase": "train", "steps_done": 3, "tokens": 0}.items() <= (
        read_status(tmp_path) or {}
    ).items()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_status_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "phase": "training", "step": 3}')
    assert read_status(tmp_path) == {"state": "running", "phase": "training", "steps_done": 3}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    RunStatus(tmp_path, 10, enabled=False).enter("rollout", 0)
    assert not list(tmp_path.iterdir())


def test_a_crash_is_recorded_and_the_first_is_believed(tmp_path: Path) -> None:
    RunStatus(tmp_path, 10, enabled=True).enter("train", 4)
    with pytest.raises(RuntimeError), recorded_end(tmp_path):
        raise RuntimeError("first\ncause")
    write_end(tmp_path, "crash", message="a consequence")
    assert {
        "state": "crash",
        "message": "RuntimeError: first cause",
        "phase": "train",
        "steps_done": 4,
    }.items() <= (read_status(tmp_path) or {}).items()


def test_bad_input_leaves_a_foreign_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.dumps({"state": "running", "pid": -1, "host": "elsewhere"})
    (tmp_path / "status.json").write_text(before)
    with pytest.raises(ConfigError), recorded_end(tmp_path):
        raise ConfigError("another configuration")
    assert (tmp_path / "status.json").read_text() == before
    monkeypatch.setenv("RLSC_ATTEMPT", "0")  # the launch script has checked that the folder is this run's
    with pytest.raises(ConfigError), recorded_end(tmp_path):
        raise ConfigError("no such split")
    assert {"state": "config", "message": "no such split"}.items() <= (read_status(tmp_path) or {}).items()


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turn this process into rank 1 of a launched run, for what is written from then on."""

    def become() -> None:
        monkeypatch.setenv("RLSC_ATTEMPT", "0")
        monkeypatch.setenv("RANK", "1")

    return become


def test_a_crash_of_another_rank_outlives_what_the_main_rank_does_next(
    tmp_path: Path, second_rank: Callable[[], None]
) -> None:
    status = RunStatus(tmp_path, 10, enabled=True)
    second_rank()
    write_end(tmp_path, "crash", message="RuntimeError: the cause")
    status.enter("rollout", 1)  # the main rank has not noticed yet
    write_end(tmp_path, "crash", message="RuntimeError: a consequence")
    assert {"state": "crash", "message": "RuntimeError: the cause", "rank": 1}.items() <= (
        read_status(tmp_path) or {}
    ).items()


def test_a_crash_that_is_written_while_the_main_rank_replaces_the_status_is_kept(
    tmp_path: Path, second_rank: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the main rank has made its new file, and puts it over the other's."""
    status, replace = RunStatus(tmp_path, 10, enabled=True), os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        running = source.read_text()
        second_rank()
        write_end(tmp_path, "crash", message="RuntimeError: the cause")
        source.write_text(running)  # another process has another partial file
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    status.enter("rollout", 1)
    assert {"state": "crash", "message": "RuntimeError: the cause"}.items() <= (
        read_status(tmp_path) or {}
    ).items()


def test_an_earlier_run_s_crash_is_forgotten(tmp_path: Path) -> None:
    RunStatus(tmp_path, 10, enabled=True)
    write_end(tmp_path, "crash", message="broken")
    RunStatus(tmp_path, 10, enabled=True).enter("train", 1)
    assert (read_status(tmp_path) or {})["state"] == "running"
    write_end(tmp_path, "done")
    assert (read_status(tmp_path) or {})["state"] == "done" and [
        path.name for path in tmp_path.iterdir()
    ] == ["status.json"]


def test_a_full_disk_does_not_leave_a_run_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second file fits: the status is written over the old one, which has its bytes already."""
    RunStatus(tmp_path, 10, enabled=True).enter("save", 4)
    size = (tmp_path / "status.json").stat().st_size

    def full(file: Path, content: bytes) -> int:
        file.touch()
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"), recorded_end(tmp_path):
        raise OSError(28, "No space left on device", str(tmp_path / "metrics.jsonl"))
    status = read_status(tmp_path) or {}
    assert status["state"] == "crash" and status["message"].startswith(
        f"{tmp_path}/metrics.jsonl: the disk is full"
    )
    assert (tmp_path / "status.json").stat().st_size == size and [
        path.name for path in tmp_path.glob("*.partial")
    ] == []


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with owned(folder) as owner:
        status = RunStatus(folder, 10, enabled=True, owner=owner)
        folder.rename(tmp_path / "moved")
        with pytest.raises(FolderLost), recorded_end(folder):
            status.enter("rollout", 1)
    assert not folder.exists() and (read_status(tmp_path / "moved") or {})["state"] == "running"


def test_a_killed_run_has_crashed_whatever_its_last_word_was(tmp_path: Path) -> None:
    write_run(tmp_path)
    program = "import os, sys; from pathlib import Path; from rlsc_mcore.run.owner import own; own(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / ".owner.json").exists()
    facts = describe(tmp_path, now=NOW)
    assert (
        facts["state"].startswith("crash: ended without a word: process ")
        and f"rlsc train --resume {tmp_path}" in facts["state"]
    )
    assert run_status([str(tmp_path)]) == 1


def test_a_status_keeps_no_secret_and_prints_no_control_character(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunStatus(tmp_path, 10, enabled=True)
    write_end(tmp_path, "crash", message="https://user:secret123@host failed \x1b[2J")
    assert "secret123" not in (tmp_path / "status.json").read_text()
    run_status([str(tmp_path)])
    assert "\x1b" not in capsys.readouterr().out
