"""Explain errors of the operating system in one line: disk space, permissions, open files, memory.

Imports no torch.
"""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = "the disk is full"
CUT_SHORT = "a write was cut short: a quota, the largest size of a file (ulimit -f), or a disk that was full a moment ago"
FULL_SHARE = 0.01  # a failed write without a cause is blamed on a full disk below this fraction of free space
_BY_NUMBER = {
    errno.ENOSPC: f"{FULL}; free space and go on",
    errno.EDQUOT: "the disk quota is used up; free space and go on",
    errno.EFBIG: "a file reached the largest size that is allowed (ulimit -f, or the file system); raise the limit",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; change the owner or the mode, or choose another place",
    errno.EPERM: "permission denied; change the owner or the mode, or choose another place",
    errno.ENOENT: "no such file or folder: it was moved or deleted, or its name is wrong",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, a file is expected",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ESTALE: "the network file system lost it (stale file handle); check the mount",
    errno.EIO: "the disk or the network file system failed (input/output error); check the mount",
    errno.ENOTCONN: "the file system is not mounted any more (not connected)",
    errno.ETIMEDOUT: "the network or the network file system did not answer in time",
    errno.EHOSTDOWN: "the file server does not answer",
    errno.EMFILE: "",  # `_cause` adds the limit
    errno.ENFILE: "the system has no file descriptors left",
    errno.ENOMEM: "out of memory",
    errno.EAGAIN: "the system has no more processes or threads for this user (ulimit -u)",
}
# Native libraries raise their own exception types and put the system's message into the text.
_BY_TEXT = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "No such file or directory": errno.ENOENT,
    "File too large": errno.EFBIG,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Too many open files": errno.EMFILE,
    "Input/output error": errno.EIO,
    "Stale file handle": errno.ESTALE,
    "Cannot allocate memory": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}
# Messages of torch's zip writer for any failed write.
_FAILED_WRITES = (
    "unexpected pos",
    "PytorchStreamWriter failed",
    "file write failed",
    "failed finding central directory",
)


def explain(error: BaseException, place: Path | None = None) -> str | None:
    """Return one line with the path and the cause if the operating system caused the error, else None.

    `place` is the folder being written; it is used for errors that name no file.
    """
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if number not in _BY_NUMBER:
            number = next((code for text, code in _BY_TEXT.items() if text in str(each)), None)
        if number is None and any(text in str(each) for text in _FAILED_WRITES) and place is not None:
            if not is_full(place):
                return f"{place}: {CUT_SHORT}"
            number = errno.ENOSPC
        if number is not None:
            file = getattr(each, "filename", None)
            where = file if isinstance(file, (str, Path)) else place
            return f"{where}: {_cause(number)}" if where is not None else _cause(number)
    return None


def is_full(place: Path) -> bool:
    """Return whether the disk of `place` has less than 1 % or less than 1 MiB free."""
    existing = next((path for path in (place, *place.parents) if path.exists()), None)
    if existing is None:
        return False
    usage = shutil.disk_usage(existing)
    return usage.free < max(1 << 20, FULL_SHARE * usage.total)


def _cause(number: int) -> str:
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: this process may have {limit}; raise it (ulimit -n 4096)"
    return _BY_NUMBER.get(number) or os.strerror(number)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
