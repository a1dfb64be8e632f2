"""Read and write the files of a checkpoint; metadata is unpickled by an allow-list only.

The files are the manifest, the pointers `latest` and `best`, the state and the metadata.
"""

import base64
import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlsc_mcore.config import CollectiveRunError, ConfigError, one_line
from rlsc_mcore.parallel.megatron_versions import common_state_as
from rlsc_mcore.parallel.messages import from_json, to_json
from rlsc_mcore.run.folder import MANIFEST, all_checkpoints, checkpoint_step
from rlsc_mcore.run.machine_errors import explain

STATE = "state.json"
METADATA = ".metadata"
COMMON = "common.json"  # the optimizer's values that are not tensors
# Format 1: the optimizer's values are in common.pt, and the field "format" is missing. Up to format 2,
# `steps_done` is named `step`.
FORMAT_FIELD, FIRST_FORMAT, FORMAT = "format", 1, 3
DAMAGED = ".damaged"
ELSEWHERE = "another rank failed"
# The only globals that a checkpoint's .metadata may name; anything else is refused before it is unpickled.
_METADATA_MODULES = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_METADATA_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}


class CheckpointError(CollectiveRunError):
    """A checkpoint could not be written or is damaged; the message names the file."""


class UnreadableCheckpoint(CollectiveRunError):
    """This process cannot read a checkpoint now; the checkpoint is not damaged and stays unchanged."""


class NewerCheckpoint(ConfigError):
    """A newer version of this program wrote the checkpoint; the checkpoint stays unchanged."""


@dataclass(frozen=True)
class RunState:
    """Hold the values of a checkpoint that are not tensors.

    A new field needs a default value. A field that older versions cannot do without needs a new FORMAT.
    """

    steps_done: int
    policy_version: int
    questions: str  # fingerprint of the question file
    torch_rng: str  # base64 of torch's CPU generator state


def read_state(checkpoint: Path) -> RunState:
    """Read state.json of a checkpoint.

    Raises `CheckpointError` if the file is missing or damaged, and `NewerCheckpoint` if a newer version wrote
    it.
    """
    file = checkpoint / STATE
    facts = _read_object(file)
    version = facts.pop(FORMAT_FIELD, FIRST_FORMAT)
    if type(version) is not int or version < FIRST_FORMAT:
        raise CheckpointError(f"{file}: not readable: {FORMAT_FIELD} is {version!r}")
    if version < FORMAT and "step" in facts:
        facts["steps_done"] = facts.pop("step")
    known = {entry.name: entry for entry in fields(RunState)}
    unknown = sorted(facts.keys() - known.keys())
    if version > FORMAT or unknown:
        what = f"format {version}" if version > FORMAT else f"with {', '.join(unknown)}"
        raise NewerCheckpoint(
            f"{checkpoint} was written by a newer version of rlsc_mcore ({what}; this one reads up to format "
            f"{FORMAT}); it is whole "
            "and left as it is: go on with that version"
        )
    required = {
        name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING
    }
    if required - facts.keys():
        raise CheckpointError(f"{file}: not readable: lacks {', '.join(sorted(required - facts.keys()))}")
    for name in ("steps_done", "policy_version"):
        if type(facts[name]) is not int or facts[name] < 0:
            raise CheckpointError(
                f"{file}: not readable: {name} is {facts[name]!r}, expected a number from 0"
            )
    _decode_rng(file, facts["torch_rng"])
    return RunState(**facts)


def _decode_rng(file: Path, text: Any) -> None:
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        content = b""
    expected = torch.random.get_rng_state().numel()
    if len(content) != expected:
        raise CheckpointError(
            f"{file}: not readable: torch_rng has {len(content)} bytes, expected {expected}"
        )


def write_state(file: Path, state: RunState) -> None:
    """Write state.json of a checkpoint, with the number of its format."""
    write_json(file, {FORMAT_FIELD: FORMAT, **asdict(state)})


def verify_files(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files in the manifest with their digests, every `world_size`-th file starting at `rank`.

    Files that the manifest does not name are not read. Raises `CheckpointError` naming the first file that
    differs, and `UnreadableCheckpoint` if this user may not read a file.
    """
    wanted = _read_object(checkpoint / MANIFEST)
    if not wanted.keys() >= {METADATA, STATE}:
        raise CheckpointError(f"{checkpoint / MANIFEST}: not readable: names no {METADATA} or no {STATE}")
    for name in sorted(wanted)[rank::world_size]:
        try:
            is_same = Path(name).name == name and wanted[name] == digest(checkpoint / name)
        except OSError as error:
            _raise_unless_damage(error, checkpoint / name)
            is_same = False
        if not is_same:
            raise CheckpointError(f"{checkpoint / name}: truncated or altered since it was saved")


def _raise_unless_damage(error: OSError, file: Path) -> None:
    """Raise `UnreadableCheckpoint` unless `error` reports a missing file, which counts as damage."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        raise UnreadableCheckpoint(explain(error) or f"{file}: {error}") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        _raise_unless_damage(error, file)
        raise CheckpointError(f"{file}: not readable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not readable: expected an object, got {type(value).__name__}")
    return value


def digest(file: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file in the form of the manifest."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]]) -> None:
    """Write the manifest of `folder`; reads only the files whose digest is not in `known`."""
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    write_json(
        folder / MANIFEST, {name: known[name] if name in known else digest(folder / name) for name in names}
    )


def write_json(file: Path, value: Any) -> None:
    """Write JSON and wait until it is on disk."""
    with file.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def point(folder: Path, pointer: str, name: str) -> None:
    """Write a checkpoint's name to the pointer file `pointer` (`latest`, `best`), by one rename."""
    partial = folder / (pointer + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(name + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, folder / pointer)


def best_checkpoint(folder: Path, scores: Mapping[int, float]) -> Path | None:
    """Return the complete checkpoint with the highest score, the latest of equal ones.

    Returns None if no checkpoint has a score.
    """
    steps = {path: checkpoint_step(path) or 0 for path in all_checkpoints(folder)}
    scored = [path for path, step in steps.items() if step in scores]
    return max(scored, key=lambda path: (scores[steps[path]], steps[path]), default=None)


def delete_older(folder: Path, *, keep: int, newest: Path, best: Path | None = None) -> None:
    """Delete all incomplete folders and all checkpoints except the last `keep` and `best`.

    The last `keep` include `newest`.
    """
    others = [path for path in all_checkpoints(folder) if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step_*.partial"):
        if checkpoint_step(path.with_suffix("")) is not None:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path | None:
    """Rename a damaged checkpoint, point `latest` at the one before it and return that one.

    Returns None if there is no earlier checkpoint. If the file system refuses the rename, the damaged folder
    stays; the next save of that step replaces it.
    """
    folder = checkpoint.parent
    step = checkpoint_step(checkpoint) or 0
    earlier = [path for path in all_checkpoints(folder) if (checkpoint_step(path) or 0) < step]
    if not earlier:
        return None
    target = checkpoint.with_name(checkpoint.name + DAMAGED)
    with contextlib.suppress(OSError):
        shutil.rmtree(target, ignore_errors=True)
        os.replace(checkpoint, target)
        point(folder, "latest", earlier[-1].name)
    return earlier[-1]


def write_failure(error: BaseException, folder: Path, rank: int) -> tuple[int, str]:
    """Return the rank on which a checkpoint could not be written and the reason in one line.

    The rank is `rank`, or the first failed rank that a `CheckpointException` names. torch's writer reports a
    full disk in its own words; `explain` recognises them.
    """
    if isinstance(error, CheckpointException):
        if not error.failures:  # only the rank that coordinates the save receives them
            return rank, ELSEWHERE
        rank, (error, _) = next(iter(error.failures.items()))
    cause = explain(error, folder)
    if cause is not None:
        return rank, cause
    free_mib = (
        shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2**20
    )
    return (
        rank,
        f"{type(error).__name__}: {' '.join(str(error).split())} (free on that disk: {free_mib:.0f} MiB)",
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (
            "." in name and (module, name) not in _METADATA_GLOBALS
        ):  # an attribute of a global, such as a module that it imports
            raise pickle.UnpicklingError(f"names {module}.{name}")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module not in _METADATA_MODULES and (module, name) not in _METADATA_GLOBALS and not is_dtype:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        found = super().find_class(module, name)
        if module in _METADATA_MODULES and not (
            isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        ):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return found


def read_metadata(file: Path) -> Any:
    """Read the layout of a checkpoint's tensors, the only pickled file, with a list of allowed globals.

    Raises `CheckpointError` for any other global, for values that are not tensors, and for a file name
    outside the checkpoint.
    """
    try:
        with file.open("rb") as content:
            metadata = _MetadataUnpickler(content).load()
        pickled = [
            name
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata)
        ]
        foreign = [
            info.relative_path
            for info in metadata.storage_data.values()
            if Path(info.relative_path).name != info.relative_path
        ]
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file}: not a checkpoint's metadata: {error}") from None
    if pickled:
        raise CheckpointError(f"{file}: holds pickled objects ({pickled[0]}, ...), expected tensors only")
    if foreign:
        raise CheckpointError(f"{file}: names a file outside of the checkpoint: {foreign[0]}")
    return metadata


class _MetadataReader:
    """Replace the module `pickle` in torch's checkpoint reader by unpickling with the allow-list."""

    @staticmethod
    def load(content: Any) -> Any:
        return read_metadata(Path(content.name))

    @staticmethod
    def dump(value: Any, content: Any, *arguments: Any) -> None:
        pickle.dump(value, content, *arguments)


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Read and write checkpoints inside the block without free unpickling.

    Metadata is unpickled by an allow-list; values that are not tensors are JSON. Tensors are read by torch's
    restricted reader, whatever its environment variables say. Mutates torch and Megatron-Core until the end
    of the block.
    """
    patched: Any = filesystem
    originals: tuple[Any, ...] = (patched.pickle, torch.load)

    def load_tensors(*arguments: Any, **options: Any) -> Any:
        return originals[1](*arguments, **{**options, "weights_only": True})

    patched.pickle = _MetadataReader
    torch.load = load_tensors
    try:
        with common_state_as(_save_common, lambda folder: read_common(Path(folder))):
            yield
    finally:
        patched.pickle, torch.load = originals


def _save_common(values: Any, folder: Any) -> None:
    if dist.get_rank() == 0:
        file = Path(folder) / COMMON
        with file.open("w", encoding="utf-8") as out:
            out.write(to_json(values) + "\n")
            out.flush()
            os.fsync(out.fileno())


def check_backend(checkpoint: Path) -> None:
    """Raise `CheckpointError` unless metadata.json names the format torch_dist, version 1."""
    file = checkpoint / "metadata.json"
    facts = _read_object(file)
    if (facts.get("sharded_backend"), facts.get("sharded_backend_version")) != ("torch_dist", 1):
        raise CheckpointError(
            f"{file}: names {facts.get('sharded_backend')!r}, expected torch_dist, version 1"
        )


def read_common(checkpoint: Path) -> Any:
    """Read the optimizer's values that are not tensors; raises `CheckpointError` if they are damaged.

    A checkpoint of format 1 stores them in torch's own format, which torch's restricted reader reads.
    """
    file = checkpoint / COMMON
    old = checkpoint / "common.pt"
    try:
        if not file.exists() and old.exists():
            return torch.load(old, map_location="cpu", weights_only=True)
        values = from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        _raise_unless_damage(error, file)
        raise CheckpointError(f"{file}: not readable: {error.strerror}") from None
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file if file.exists() else old}: not readable: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not readable: expected an object, got {type(values).__name__}")
    return values
