"""Tell whether another process still lives: by its machine, process id and start time. Imports no torch."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


def describe_process() -> dict[str, Any]:
    """Identify this process beyond its id, which the system gives out again: machine, process namespace and
    start time."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _start_ticks(os.getpid()),
    }


def is_alive(process: dict[str, Any]) -> bool | None:
    """Tell whether a process of `describe_process` lives; None where this machine cannot know, as it ran on
    another one.

    A process that has ended and was not collected by its parent counts as dead.
    """
    machine = _machine()
    if process.get("machine") != machine or (not machine and process.get("host") != socket.gethostname()):
        return None
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return None
    if not _PROC.joinpath("self", "stat").exists():  # no /proc: the id alone has to do
        return _answers_signals(pid)
    ticks = _start_ticks(pid)
    return ticks is not None and ticks == process.get("process_started")


def _machine() -> str:
    """Name the running kernel and the namespace of process ids: the same id means another process in another
    container."""
    names = []
    with contextlib.suppress(OSError):
        names.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        names.append(os.readlink(_PROC / "self/ns/pid"))
    return " ".join(names)


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it has ended (a zombie too) or
    there is no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
