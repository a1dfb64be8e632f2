"""Lock a folder, so that only one process at a time writes a run's folder. Imports no torch.

The owner keeps the lock file `.owner.json` in the folder. It holds the host, process id and start time, the
SLURM job and attempt, and a token. The modification time of the file is the heartbeat. Another process may
take over a stale lock. A lock is stale if

- its process ran on this machine and has ended, or
- it belongs to an earlier attempt of this process's SLURM job, which SLURM ends before it starts the next
one, or
- SLURM reports that its job has ended, or
- no SLURM job can be queried and the heartbeat is older than `STALE_AFTER_S`.

If SLURM does not answer, the lock is not stale. Where possible, both times of a heartbeat's age are file
times of the same file system, so the clocks of two machines may differ.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, RunError
from rlsc_mcore.run.machine import describe_process, is_alive

OWNER_FILE = ".owner.json"
STALE_AFTER_S = 600.0  # long, because a file system or a library can block the process and delay a heartbeat
HEARTBEAT_S = 15.0
SCHEDULER_TIMEOUT_S = 30.0
_SETTLE_S = 0.2  # on a file system without locks, a concurrent process has overwritten the lock file by then
_LIVE_STATES = (
    "PENDING,RUNNING,SUSPENDED,COMPLETING,CONFIGURING,STOPPED,RESIZING,REQUEUED,SIGNALING,STAGE_OUT"
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUse(ConfigError):
    """Raised if another process owns the folder and may still write it; nothing has been changed."""


class FolderLost(RunError):
    """Raised if the folder is taken over, moved or deleted while this process owns it."""


@dataclass
class _Held:
    owner: "Owner"
    times: int = 1


_held: dict[str, _Held] = {}  # resolved path of the lock file -> owner and nesting depth


class Owner:
    """A folder lock held by this process; `own` creates it, and a thread writes its heartbeat."""

    def __init__(self, file: Path, token: str, took_over: str) -> None:
        self.file, self.token = file, token
        self.took_over = took_over  # description of the previous owner, or "" if there was none
        self._lost = ""
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="folder owner", daemon=True).start()

    def check(self) -> None:
        """Raise `FolderLost` if the folder is gone or belongs to another process; the caller must not write
        into it then."""
        if not self._lost:
            self._look()
        if self._lost:
            raise FolderLost(self._lost)

    def release(self) -> None:
        """Release the folder; delete the lock file if it still belongs to this process."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if _read(self.file).get("token") == self.token:
                self.file.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._look()
            if self._lost:
                return
            with contextlib.suppress(OSError):  # on a full or read-only disk the run's own writes fail
                os.utime(self.file)

    def _look(self) -> None:
        folder = self.file.parent
        try:
            facts = _read(self.file)
        except FileNotFoundError:
            self._lost = (
                f"{self.file} was deleted while this process owned the folder; nothing is written any more"
                if folder.is_dir()
                else f"the folder {folder} is gone: it was moved or deleted while this process wrote it"
            )
        except OSError:
            return  # a temporary read error must not end the run
        else:
            if facts.get("token") != self.token and not self._ended.is_set():
                self._lost = f"{folder} was taken over by {_describe(facts)}; nothing is written any more"


def own(folder: Path, *, file_name: str = OWNER_FILE) -> Owner:
    """Lock the existing `folder` for this process; `disown` releases it.

    Raises `FolderInUse` naming the current owner, and OSError if the folder cannot be written. Calls for the
    same folder can be nested.
    """
    file = Path(os.path.realpath(folder)) / file_name
    held = _held.get(str(file))
    if held is not None:
        held.owner.check()
        held.times += 1
        return held.owner
    token = secrets.token_hex(16)
    with _exclusive(file) as descriptor:
        facts = _facts(file)
        _refuse_living(folder, facts, _age(file) if facts else 0.0)
        mine = {
            **_describe_me(),
            "token": token,
            "folder": str(file.parent),
            "inode": os.fstat(descriptor).st_ino,
        }
        content = json.dumps(mine, indent=1).encode() + b"\n"
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    time.sleep(_SETTLE_S)
    rival = _facts(file)
    if rival is None or rival.get("token") != token:
        raise FolderInUse(f"{folder} was taken at the same moment by {_describe(rival or {})}")
    owner = Owner(file, token, _describe(facts) if facts else "")
    _held[str(file)] = _Held(owner)
    return owner


def disown(owner: Owner) -> None:
    """Undo one call of `own`; the last of nested calls releases the folder."""
    held = _held.get(str(owner.file))
    if held is None or held.owner is not owner:
        return
    held.times -= 1
    if held.times == 0:
        del _held[str(owner.file)]
        owner.release()


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """After the block, undo one call of `own(folder)` if there was one inside the block."""
    file = str(Path(os.path.realpath(folder)) / OWNER_FILE)
    before = _held[file].times if file in _held else 0
    try:
        yield
    finally:
        if file in _held and _held[file].times > before:
            disown(_held[file].owner)


def release_all() -> None:
    """Release every folder of this process; called when the process exits without running `finally`
    blocks."""
    while _held:
        _held.popitem()[1].owner.release()


def is_main_rank() -> bool:
    """Return whether this process is rank 0, which owns folders and prints; needs no process group."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def owned(folder: Path, *, file_name: str = OWNER_FILE) -> Iterator[Owner]:
    """Own `folder` inside the block."""
    owner = own(folder, file_name=file_name)
    try:
        yield owner
    finally:
        disown(owner)


def refuse_owned(folder: Path, *, file_name: str = OWNER_FILE) -> None:
    """Raise `FolderInUse` if another process may be writing `folder`; writes nothing."""
    file = Path(os.path.realpath(folder)) / file_name
    if str(file) in _held:
        return
    facts = _facts(file)
    if facts is not None:
        _refuse_living(folder, facts, _age(file, writable=False))


def owner_state(folder: Path) -> tuple[bool | None, str]:
    """Return (whether the owner of `folder` is alive, description of the owner); does not query SLURM.

    The first value is None if there is no owner or if it ran on another machine.
    """
    file = Path(os.path.realpath(folder)) / OWNER_FILE
    facts = _facts(file)
    if facts is None:
        return None, ""
    return is_alive(facts), _describe(facts)


def _refuse_living(folder: Path, facts: dict[str, Any] | None, age: float) -> None:
    """Raise `FolderInUse` unless the lock `facts` is stale."""
    if facts is None or _is_earlier_attempt(facts):
        return
    alive = is_alive(facts)
    if alive is False:
        return
    who = _describe(facts)
    if alive is None and facts.get("job") and shutil.which("squeue"):
        over = job_is_over(facts)
        if over:
            return
        if over is None:
            raise FolderInUse(
                f"{folder} belongs to {who}, and SLURM does not answer whether that job has ended; try again "
                "later"
            )
    elif alive is None and age > STALE_AFTER_S:
        return
    raise FolderInUse(
        f"{folder} is in use by {who}, heartbeat {max(0.0, age):.0f} s ago; wait for it to end, stop it, or "
        "choose another folder"
    )


def _is_earlier_attempt(facts: dict[str, Any]) -> bool:
    me = _describe_me()
    if not me["job"] or (facts.get("job"), facts.get("cluster")) != (me["job"], me["cluster"]):
        return False
    return int(facts.get("attempt") or 0) < me["attempt"]


def job_is_over(facts: dict[str, Any]) -> bool | None:
    """Return whether SLURM reports that the lock's job has ended; None if there is no job or no answer."""
    job, squeue = facts.get("job"), shutil.which("squeue")
    if not job or squeue is None:
        return None
    command = [squeue, "--noheader", f"--jobs={job}", f"--states={_LIVE_STATES}", "--format=%T"]
    if facts.get("cluster") and facts["cluster"] != os.environ.get("SLURM_CLUSTER_NAME", facts["cluster"]):
        command.append(f"--clusters={facts['cluster']}")
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=SCHEDULER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode == 0:
        return not [line for line in answer.stdout.splitlines() if line.strip()]
    return True if "Invalid job id" in answer.stderr else None  # SLURM does not know jobs that ended long ago


def _describe_me() -> dict[str, Any]:
    array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = "_".join(array) if all(array) else os.environ.get("SLURM_JOB_ID")  # type: ignore[arg-type]
    return {
        **describe_process(),
        "job": job,
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _describe(facts: dict[str, Any]) -> str:
    job = f"job {facts['job']}, " if facts.get("job") else ""
    return f"{job}process {facts.get('pid', '?')} on {facts.get('host', 'an unknown host')} (started {facts.get('started', 'unknown')})"


@contextmanager
def _exclusive(file: Path) -> Iterator[int]:
    """Open the lock file with an exclusive `flock`; on a file system without locks the last writer wins."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            with contextlib.suppress(FileNotFoundError):
                if (
                    os.stat(file).st_ino == os.fstat(descriptor).st_ino
                ):  # otherwise the owner deleted the file after `os.open`: try again
                    yield descriptor
                    return
        finally:
            os.close(descriptor)


def _facts(file: Path) -> dict[str, Any] | None:
    """Return the content of the lock file; None if it is missing, incomplete, or a copy of another folder's
    lock file."""
    try:
        facts = _read(file)
        inode = os.stat(file).st_ino
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: {error.strerror}; it names the owner of the folder"
        ) from None
    is_copy = facts.get("inode") != inode and facts.get("folder") != str(file.parent)
    return None if is_copy or "token" not in facts else facts


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _age(file: Path, *, writable: bool = True) -> float:
    """Return the seconds since the last heartbeat.

    The current time is that of a new temporary file in the folder, or this machine's clock if none can be
    created.
    """
    beat = os.stat(file).st_mtime
    if writable:
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=file.parent) as probe:
            probe.write(b" ")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime - beat
    return time.time() - beat
