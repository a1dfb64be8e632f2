"""Replace only files that this program wrote: a marker file in each folder lists them. Imports no torch.

A folder without the marker is never replaced. In a folder with the marker only the listed files are replaced;
other files in it are kept.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.machine import describe_process, is_alive

MARKER = ".made_by_rlsc.json"
PARTIAL = ".rlsc-partial"
FILE_MARK = "made by rlsc_mcore"  # text in reports and figures, which may then be replaced


def check_replaceable(folder: Path, *, field: str, keep: tuple[Path, ...] = ()) -> None:
    """Raise `ConfigError` naming `field` unless `folder` is absent, empty, or has this program's marker.

    Also raises if `folder` is one of `keep` or contains one of them: those folders are read.
    """
    target = Path(os.path.realpath(folder))
    for other in keep:
        kept = Path(os.path.realpath(other))
        if target == kept or target in kept.parents:
            raise ConfigError(
                f"{field} {folder}: it is or holds {other}, which is read; choose another folder"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{field} {folder}: a file is there; choose another folder")
    if any(target.iterdir()) and files_made(target) is None:
        raise ConfigError(
            f"{field} {folder}: exists and was not made by this program (no {MARKER} in it); it is left "
            "alone: "
            "choose another folder, or remove it yourself"
        )


def files_made(folder: Path) -> list[str] | None:
    """Return the names of the files that this program wrote into `folder`, or None if it has no marker."""
    try:
        names = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (
        [name for name in names if isinstance(name, str) and Path(name).name == name]
        if isinstance(names, list)
        else None
    )


def mark(folder: Path, made_by: str) -> None:
    """Write the marker into `folder` with the names of its current entries."""
    facts = {
        "made_by": made_by,
        "files": sorted(path.name for path in folder.iterdir() if path.name != MARKER),
    }
    (folder / MARKER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(folder: Path, made_by: str) -> Iterator[Path]:
    """Yield an empty folder and rename it to `folder` after the block; if the block raises, `folder` is
    unchanged.

    Files that this program wrote into `folder` earlier are replaced; other files in it are kept. File modes
    follow the umask. Raises `ConfigError` if `folder` may not be replaced.
    """
    target = Path(os.path.realpath(folder))
    check_replaceable(target, field="folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    partial.mkdir()
    try:
        (partial / MARKER).write_text(json.dumps({"process": describe_process()}), encoding="utf-8")
        yield partial
        mark(partial, made_by)
        _apply_umask(partial)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        os.replace(partial, target)
        return
    ours = {*(files_made(target) or []), MARKER}
    old = target.with_name(partial.name.removesuffix(PARTIAL) + ".old" + PARTIAL)
    os.replace(target, old)
    os.replace(partial, target)
    for path in old.iterdir():
        if path.name not in ours:
            place = target / path.name
            os.replace(path, place if not place.exists() else place.with_name(f"{path.name}.before"))
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Delete the temporary folders beside `target` whose process on this machine has ended."""
    for folder in target.parent.glob(f".{target.name}.*{PARTIAL}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            process = json.loads((folder / MARKER).read_text(encoding="utf-8"))["process"]
            if not folder.is_symlink() and is_alive(process) is False:
                shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """Return the umask without changing it, because another thread may create a file at the same time."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    return 0o077


def _apply_umask(folder: Path) -> None:
    """Set the files to the mode that `open` gives by default, because libraries create some with mode 600."""
    umask = _umask()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)
