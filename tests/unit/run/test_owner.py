"""One process owns a run's folder: who is refused, and when a lock is stale."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.run import owner as module
from rlsc_mcore.run.owner import (
    OWNER_FILE,
    STALE_AFTER_S,
    FolderInUse,
    FolderLost,
    disown,
    own,
    owned,
    owner_state,
    refuse_owned,
)

HOLD = """
import sys, time
from pathlib import Path
from rlsc_mcore.run.owner import own
try:
    own(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error, flush=True)
    raise SystemExit(2)
print("owned", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns tmp_path."""
    process = start(tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def start(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def edit(folder: Path, *, silent_s: float | None = None, **changes: Any) -> None:
    """Change the lock in place, as its owner would have written it, and the age of its heartbeat."""
    file = folder / OWNER_FILE
    with file.open("r+", encoding="utf-8") as content:
        facts = json.load(content) | changes
        content.seek(0)
        content.truncate()
        json.dump(facts, content)
    if silent_s is not None:
        os.utime(file, (time.time() - silent_s, time.time() - silent_s))


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `squeue` that answers as SLURM's own does into PATH."""
    folder.mkdir()
    command = folder / "squeue"
    command.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


ELSEWHERE = {"machine": "another boot", "host": "node7", "process_started": 1}


def test_the_second_process_is_refused_and_changes_nothing(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    before = (tmp_path / OWNER_FILE).read_bytes()
    for refuse in (own, refuse_owned):
        with pytest.raises(FolderInUse, match=rf"in use by process {other.pid} on .*heartbeat \d+ s ago"):
            refuse(tmp_path)
    assert (tmp_path / OWNER_FILE).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [
        OWNER_FILE
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_s_folder_is_taken_over_at_once(
    tmp_path: Path, other: "subprocess.Popen[str]", number: int
) -> None:
    other.send_signal(number)
    while owner_state(tmp_path)[0] is not False:  # a zombie until its parent asks for it
        time.sleep(0.01)
    with owned(tmp_path) as mine:
        assert f"process {other.pid} on " in mine.took_over
        mine.check()
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_stopped_owner_is_alive(tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    other.send_signal(signal.SIGSTOP)
    edit(tmp_path, silent_s=10 * STALE_AFTER_S)
    with pytest.raises(FolderInUse):
        own(tmp_path)


def test_the_same_process_id_of_another_process_is_no_owner(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    facts = json.loads((tmp_path / OWNER_FILE).read_text())
    edit(tmp_path, process_started=facts["process_started"] - 1)
    with owned(tmp_path) as mine:
        assert mine.took_over


@pytest.mark.parametrize(
    ("silent_s", "is_stale"), [(0.0, False), (STALE_AFTER_S - 60, False), (STALE_AFTER_S + 60, True)]
)
def test_another_machine_s_owner_is_judged_by_its_heartbeat(
    tmp_path: Path, other: "subprocess.Popen[str]", silent_s: float, is_stale: bool
) -> None:
    edit(tmp_path, silent_s=silent_s, **ELSEWHERE)
    if is_stale:
        with owned(tmp_path) as mine:
            assert "node7" in mine.took_over
    else:
        with pytest.raises(FolderInUse, match="node7"):
            own(tmp_path)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo RUNNING", "is in use by job 4711"),
        ("echo PENDING", "is in use by job 4711"),
        ("exit 0", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
            "SLURM does not answer",
        ),
        (
            "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1",
            "SLURM does not answer",
        ),
        ("exit 127", "SLURM does not answer"),
        ("sleep 20", "SLURM does not answer"),
    ],
)
def test_slurm_is_asked_about_a_job_on_another_machine(
    tmp_path: Path,
    other: "subprocess.Popen[str]",
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    expected: str | None,
) -> None:
    """However long it has been silent: a scheduler that does not answer never means that the job has
    ended."""
    monkeypatch.setattr(module, "SCHEDULER_TIMEOUT_S", 4.0)
    fake_squeue(tmp_path / "bin", monkeypatch, answer)
    edit(tmp_path, silent_s=10 * STALE_AFTER_S, job="4711", **ELSEWHERE)
    if expected is None:
        with owned(tmp_path) as mine:
            assert "job 4711" in mine.took_over
    else:
        with pytest.raises(FolderInUse, match=expected):
            own(tmp_path)


@pytest.mark.parametrize(
    ("mine", "is_stale"),
    [
        ({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}, True),  # the same job after its node was lost
        ({"SLURM_JOB_ID": "4711"}, False),  # job ids that start again
        ({"SLURM_JOB_ID": "4712", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "other"}, False),
        (
            {
                "SLURM_JOB_ID": "4711",
                "SLURM_ARRAY_JOB_ID": "4711",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_RESTART_COUNT": "1",
            },
            False,
        ),
    ],
)
def test_a_later_attempt_of_the_same_job_takes_over_at_once(
    tmp_path: Path,
    other: "subprocess.Popen[str]",
    monkeypatch: pytest.MonkeyPatch,
    mine: dict[str, str],
    is_stale: bool,
) -> None:
    fake_squeue(tmp_path / "bin", monkeypatch, "echo RUNNING")
    edit(tmp_path, silent_s=5, job="4711", cluster=None, attempt=0, **ELSEWHERE)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    if is_stale:
        with owned(tmp_path) as owner:
            assert owner.took_over
    else:
        with pytest.raises(FolderInUse):
            own(tmp_path)


def test_a_copied_folder_brings_no_owner(tmp_path: Path) -> None:
    folder, copy = tmp_path / "run", tmp_path / "copy"
    folder.mkdir()
    with owned(folder):
        shutil.copytree(folder, copy)
        with owned(copy) as mine:
            assert not mine.took_over


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_an_unfinished_lock_is_no_lock(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNER_FILE).write_bytes(content)
    with owned(tmp_path) as mine:
        assert not mine.took_over


def test_of_many_that_begin_at_once_one_owns(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(6)]
    try:
        lines = [process.stdout.readline() for process in processes if process.stdout]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert lines.count("owned\n") == 1 and sum(line.startswith("FolderInUse") for line in lines) == 5


def test_blocks_nest_in_one_process(tmp_path: Path) -> None:
    with owned(tmp_path) as outer:
        with owned(tmp_path) as inner:
            assert inner is outer
        assert (tmp_path / OWNER_FILE).is_file()
        refuse_owned(tmp_path)
    assert not (tmp_path / OWNER_FILE).exists()


def test_an_owner_learns_that_its_folder_is_gone_or_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    mine = own(folder)
    mine.check()
    folder.rename(tmp_path / "moved")
    with pytest.raises(FolderLost, match=r"is gone: it was moved or deleted"):
        mine.check()
    assert not folder.exists()
    disown(mine)
    folder = tmp_path / "moved"
    (folder / OWNER_FILE).unlink()
    mine = own(folder)
    edit(folder, token="another", host="node9")
    with pytest.raises(FolderLost, match=r"was taken over by .*node9"):
        mine.check()
    disown(mine)
    assert (folder / OWNER_FILE).exists()  # the other's


def test_the_heartbeat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with owned(tmp_path):
        edit(tmp_path, silent_s=1000)
        limit = time.monotonic() + 20
        while (tmp_path / OWNER_FILE).stat().st_mtime < time.time() - 500:
            assert time.monotonic() < limit
            time.sleep(0.02)
    limit = time.monotonic() + 20
    while any(thread.name == "folder owner" for thread in threading.enumerate()):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_the_lock_is_private(tmp_path: Path) -> None:
    with owned(tmp_path):
        assert (tmp_path / OWNER_FILE).stat().st_mode & 0o777 == 0o600
