"""Temporary folders that do not outlive their process: what a killed one left goes at the next start. Imports
no torch."""

import atexit
import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlsc_mcore.run.machine import describe_process, is_alive

PREFIX = "rlsc-scratch-"
MARKER = "process.json"
UNMARKED_AFTER_S = 3600.0  # a folder without a readable marker: its process was killed while it made it
_folders: list[Path] = []  # of this process


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Make a private temporary folder (mode 700) that names this process, and delete it after the block."""
    folder = make_scratch(purpose)
    try:
        yield folder
    finally:
        _remove(folder)


def make_scratch(purpose: str) -> Path:
    """Make a private temporary folder (mode 700) that is deleted when this process ends, or by the next one
    after a kill."""
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
    (folder / MARKER).write_text(json.dumps(describe_process()), encoding="utf-8")
    if not _folders:
        atexit.register(remove_scratch)
    _folders.append(folder)
    return folder


def private_cache(name: str) -> Path:
    """Return this user's cache folder `name`, of mode 700 and nobody else's; a temporary one where there is
    no such folder.

    What is compiled there is loaded into the process: a folder that another user owns or may write is
    refused.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "rlsc" / name
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(folder) and os.access(folder, os.W_OK):
            return folder
    return make_scratch(name)


def is_private(folder: Path) -> bool:
    """Tell whether a folder is this user's own, no link, and closed to writes of all others."""
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def remove_scratch() -> None:
    """Delete this process's temporary folders; for endings that run no `finally`."""
    while _folders:
        _remove(_folders[-1])


def remove_leftovers() -> None:
    """Delete the temporary folders of this user's processes that have ended on this machine."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                if (
                    folder.lstat().st_uid == os.getuid()
                    and folder.is_dir()
                    and not folder.is_symlink()
                    and _is_left(folder)
                ):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    try:
        return is_alive(json.loads((folder / MARKER).read_text(encoding="utf-8"))) is False
    except (OSError, ValueError, AttributeError):
        return time.time() - folder.lstat().st_mtime > UNMARKED_AFTER_S


def _remove(folder: Path) -> None:
    with contextlib.suppress(ValueError):
        _folders.remove(folder)
    shutil.rmtree(folder, ignore_errors=True)
