"""The files of a checkpoint: their manifest, the pointers to them, which are kept, and what may be unpickled."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlsc_mcore.config import CollectiveRunError

STATE, MANIFEST = "state.json", "manifest.json"
DAMAGED = ".damaged"
ELSEWHERE = "another rank failed"
# The only globals that a checkpoint's .metadata may name; anything else is refused before it is unpickled.
_METADATA_MODULES = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_METADATA_GLOBALS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class CheckpointError(CollectiveRunError):
    """A checkpoint that could not be written or is damaged; the message names the file."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint knows beside tensors."""

    step: int  # optimizer steps done
    policy_version: int
    questions: str  # fingerprint of the question file
    torch_rng: str  # base64 of torch's CPU generator state


def read_state(checkpoint: Path) -> RunState:
    """Read a checkpoint's facts; raises `CheckpointError` when the file is missing or damaged."""
    try:
        return RunState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: not readable: {error}") from None


def verify_files(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare files with the manifest, every `world_size`-th from `rank` on; raises `CheckpointError` naming the first that differs."""
    try:
        wanted = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: not readable: {error}") from None
    present = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
    for name in sorted(wanted.keys() | present)[rank::world_size]:
        if name not in present or wanted.get(name) != digest(checkpoint / name):
            raise CheckpointError(f"{checkpoint / name}: truncated or altered since it was saved")


def digest(file: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256, as the manifest holds them."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]]) -> None:
    """Write the manifest of `folder`; only files whose digest is not `known` yet are read."""
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    write_json(folder / MANIFEST, {name: known[name] if name in known else digest(folder / name) for name in names})


def write_json(file: Path, value: Any) -> None:
    """Write JSON and wait until it is on disk."""
    with file.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def point(folder: Path, pointer: str, name: str) -> None:
    """Let the file `pointer` (`latest`, `best`) name a checkpoint, by one rename."""
    partial = folder / (pointer + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(name + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, folder / pointer)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints by rising step; partial and damaged ones are none."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.suffix)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def best_checkpoint(folder: Path, scores: Mapping[int, float]) -> Path | None:
    """Return the complete checkpoint with the highest score, the later one of equals; None where none has a score."""
    scored = [path for path in complete_checkpoints(folder) if step_of(path) in scores]
    return max(scored, key=lambda path: (scores[step_of(path)], path.name), default=None)


def delete_older(folder: Path, *, keep: int, newest: Path, best: Path | None = None) -> None:
    """Delete what is neither among the last `keep` (the newest included) nor the best, and what was left half-written."""
    others = [path for path in complete_checkpoints(folder) if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path | None:
    """Rename a damaged checkpoint and let `latest` name the one before it, which is returned; None where there is none."""
    folder = checkpoint.parent
    earlier = [path for path in complete_checkpoints(folder) if path.name < checkpoint.name]
    if not earlier:
        return None
    target = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(target, ignore_errors=True)
    point(folder, "latest", earlier[-1].name)
    os.replace(checkpoint, target)
    return earlier[-1]


def write_failure(error: BaseException, folder: Path, rank: int) -> tuple[int, str]:
    """Say in one line why a checkpoint could not be written, and on which rank (`rank` unless the error knows better).

    torch's writer reports a full disk in its own words.
    """
    if isinstance(error, CheckpointException):
        if not error.failures:  # only the rank that coordinates the save learns them
            return rank, ELSEWHERE
        rank, (error, _) = next(iter(error.failures.items()))
    free_mib = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2**20
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return rank, "the disk is full; free space and resume"
    return rank, f"{type(error).__name__}: {' '.join(str(error).split())} (free on that disk: {free_mib:.0f} MiB)"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if "." in name and (module, name) not in _METADATA_GLOBALS:  # an attribute of a global, such as a module that it imports
            raise pickle.UnpicklingError(f"names {module}.{name}")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module not in _METADATA_MODULES and (module, name) not in _METADATA_GLOBALS and not is_dtype:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        found = super().find_class(module, name)
        if module in _METADATA_MODULES and not (isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return found


def refuse_foreign_pickles(file: Path) -> None:
    """Check the one pickled file of torch's checkpoint format against a list of allowed globals."""
    try:
        with file.open("rb") as content:
            metadata = _MetadataUnpickler(content).load()
        pickled = [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file}: not a checkpoint's metadata: {error}") from None
    if pickled:
        raise CheckpointError(f"{file}: holds pickled objects ({pickled[0]}, ...), expected tensors only")
