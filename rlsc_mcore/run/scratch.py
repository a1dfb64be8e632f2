"""Create temporary folders that are deleted when their process ends. Imports no torch.

Folders of a killed process are deleted when a later process creates one.
"""

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
UNMARKED_AFTER_S = 3600.0  # age at which a folder without a readable marker is deleted
_folders: list[Path] = []  # temporary folders of this process


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Create a private temporary folder (mode 700) with this process's marker; delete it after the block."""
    folder = make_scratch(purpose)
    try:
        yield folder
    finally:
        _remove(folder)


def make_scratch(purpose: str) -> Path:
    """Create a private temporary folder (mode 700) that is deleted when this process ends.

    If this process is killed, a later process deletes the folder.
    """
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
    (folder / MARKER).write_text(json.dumps(describe_process()), encoding="utf-8")
    if not _folders:
        atexit.register(remove_scratch)
    _folders.append(folder)
    return folder


def private_cache(name: str) -> Path:
    """Return this user's cache folder `name`, created with mode 700, or a temporary folder if it is not
    usable.

    The process loads compiled code from this folder. So a folder that another user owns or may write is not
    used.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "rlsc" / name
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(folder) and os.access(folder, os.W_OK):
            return folder
    return make_scratch(name)


def is_private(folder: Path) -> bool:
    """Return whether a path is a folder and no link, belongs to this user, and only its owner may write
    it."""
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def remove_scratch() -> None:
    """Delete this process's temporary folders; called when the process exits without running `finally`
    blocks."""
    while _folders:
        _remove(_folders[-1])


def remove_leftovers() -> None:
    """Delete the temporary folders of this user's ended processes on this machine."""
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
