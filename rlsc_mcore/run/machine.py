"""Check whether another process is alive, by its machine, process id and start time. Imports no torch."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


def describe_process() -> dict[str, Any]:
    """Return this process's host, machine, process id and start time.

    The process id alone does not identify a process, because the system reuses ids.
    """
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _start_ticks(os.getpid()),
    }


def is_alive(process: dict[str, Any]) -> bool | None:
    """Return whether a process described by `describe_process` is alive; None if it ran on another machine.

    A zombie process counts as dead.
    """
    machine = _machine()
    if process.get("machine") != machine or (not machine and process.get("host") != socket.gethostname()):
        return None
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return None
    if not _PROC.joinpath("self", "stat").exists():  # no /proc: only the process id can be checked
        return _answers_signals(pid)
    ticks = _start_ticks(pid)
    return ticks is not None and ticks == process.get("process_started")


def _machine() -> str:
    """Return the boot id and the process-id namespace; two containers can have different processes with the
    same id."""
    names = []
    with contextlib.suppress(OSError):
        names.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        names.append(os.readlink(_PROC / "self/ns/pid"))
    return " ".join(names)


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it has ended, is a zombie, or
    there is no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the process name may contain spaces and brackets
    return None if state in "ZX" else int(fields[18])


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
