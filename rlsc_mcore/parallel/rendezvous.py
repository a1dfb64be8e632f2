"""Connect the ranks within a time limit, and name the missing ranks if it expires.

On one node every socket is on the loopback interface, because gloo, the store and NCCL's bootstrap have no
authentication.
"""

import errno
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlsc_mcore.config import CollectiveRunError, ConfigError, RunError, one_line
from rlsc_mcore.parallel.messages import restrict_unpickling

TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S = "RLSC_RENDEZVOUS_TIMEOUT_S", 120.0
LOOPBACK = "127.0.0.1"
_POLL_S = 0.05
_SHOWN = 8


def is_launched() -> bool:
    """Return whether torchrun or the launch script for srun started this process as a rank."""
    return "RANK" in os.environ


def is_one_node() -> bool:
    """Return whether all ranks are on this machine, from the variables of torchrun or the launch script.

    Without these variables the answer is True for a world of one rank only.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", "1" if world == "1" else "") == world


def use_loopback() -> None:
    """Bind the sockets of a single node to the loopback interface unless the user names another.

    Mutates the environment.
    """
    if is_one_node():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def share_one_listener() -> None:
    """Let all single-rank gloo groups share one device, that is one loopback socket and thread.

    Megatron-Core creates 33 groups in a world of one. Mutates `torch.distributed`.
    """
    from torch.distributed import distributed_c10d

    original: Any = distributed_c10d.ProcessGroupGloo
    if isinstance(original, _SharingType):
        return
    devices: list[Any] = []

    class Sharing(metaclass=_SharingType, original=original, devices=devices):
        """Replace `ProcessGroupGloo`."""

    distributed_c10d.ProcessGroupGloo = Sharing  # type: ignore[assignment,misc]


class _SharingType(type):
    """Create gloo groups like `ProcessGroupGloo`, but put groups of one rank on a shared device."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any) -> Any:
        return super().__new__(cls, name, bases, body)

    def __init__(
        cls, name: str, bases: tuple[type, ...], body: dict[str, Any], *, original: Any, devices: list[Any]
    ) -> None:
        super().__init__(name, bases, body)
        cls._original, cls._devices = original, devices

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._original, name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._original)

    def __call__(cls, store: Any, rank: int, size: int, *arguments: Any, **options: Any) -> Any:
        if size > 1 or arguments or set(options) - {"timeout"}:
            return cls._original(store, rank, size, *arguments, **options)
        if not cls._devices:
            cls._devices.append(cls._original.create_device(hostname=LOOPBACK))
        settings = cls._original._Options()
        settings._devices, settings._threads = cls._devices, 1
        if "timeout" in options:
            settings._timeout = options["timeout"]
        return cls._original(store, rank, size, settings)


def meet(timeout_s: float, *, needs_address: bool = False) -> tuple[Any, int, int]:
    """Return the rendezvous store, this rank and the world size after all ranks have joined.

    Collective over the world. Without a launcher the world has one rank. Its store is in memory, or on a free
    loopback port for NCCL (`needs_address`). Raises `ConfigError` for invalid launcher variables, and
    `RunError` naming the address and the missing ranks after `timeout_s` seconds.
    """
    stores: Any = dist  # torch does not export the store types
    restrict_unpickling()
    use_loopback()
    share_one_listener()
    if not is_launched():
        return (
            (
                _open_store(LOOPBACK, 0, 0, 1, timeout_s, is_master=True)
                if needs_address
                else stores.HashStore()
            ),
            0,
            1,
        )
    rank, world = _number("RANK", low=0), _number("WORLD_SIZE", low=1)
    if rank >= world:
        raise ConfigError(f"RANK: {rank} is not below WORLD_SIZE = {world}")
    port = _number("MASTER_PORT", low=1, high=65535)
    address = os.environ.get("MASTER_ADDR", "")
    if not address:
        raise ConfigError("MASTER_ADDR: not set; start the ranks with torchrun or a launch script")
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_one_node() and not has_agent:
        address = os.environ["MASTER_ADDR"] = LOOPBACK
    deadline = time.monotonic() + timeout_s
    store = _open_store(address, port, rank, world, timeout_s, is_master=rank == 0 and not has_agent)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = stores.PrefixStore(f"rlsc_meeting_{attempt}", store)
    _wait_for_all(store, f"{address}:{port}", rank, world, timeout_s, deadline)
    return store, rank, world


def _open_store(address: str, port: int, rank: int, world: int, timeout_s: float, *, is_master: bool) -> Any:
    stores: Any = dist
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False}
    if is_master and address == LOOPBACK:
        options["master_listen_fd"], port = _listen(port)
        options["use_libuv"] = True
    try:
        return stores.TCPStore(address, port, world, is_master, **options)
    except (
        RuntimeError,
        OSError,
        ValueError,
    ) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        reason = one_line(error, 1000)
        if "EADDRINUSE" in reason or "already in use" in reason:
            raise _port_is_taken(address, port) from None
        who = (
            "cannot listen there"
            if is_master
            else f"rank {rank} found no rank 0 there within {timeout_s:.0f} s ({TIMEOUT_VARIABLE})"
        )
        raise RunError(f"rendezvous at {address}:{port}: {who}: {reason[:200]}") from None


def _listen(port: int) -> tuple[int, int]:
    """Open the store's socket on the loopback interface; return its file descriptor and port.

    Port 0 selects a free port. torch itself would listen on all addresses.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _port_is_taken(LOOPBACK, port) from None
        raise
    port = listener.getsockname()[1]
    return listener.detach(), port


def _port_is_taken(address: str, port: int) -> RunError:
    return RunError(
        f"rendezvous at {address}:{port}: the port is taken by another program; choose another (MASTER_PORT, "
        "--master-port)"
    )


def _wait_for_all(store: Any, place: str, rank: int, world: int, timeout_s: float, deadline: float) -> None:
    missing = list(range(world))
    try:
        store.set(f"here/{rank}", socket.gethostname())
        while True:
            missing = [each for each in missing if not store.check([f"here/{each}"])]
            if not missing:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
    except (RuntimeError, OSError) as error:
        reason = one_line(error)
        raise RunError(
            f"rendezvous at {place}: the store of rank 0 does not answer rank {rank}: {reason}"
        ) from None
    if rank == 0:  # its process may host the store, which other ranks still read
        time.sleep(20 * _POLL_S)
    names = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    late = f"{len(missing)} of {world} ranks did not come within {timeout_s:.0f} s ({TIMEOUT_VARIABLE})"
    text = f"rendezvous at {place}: {late}: rank {names}"
    raise CollectiveRunError(text) if 0 not in missing else RunError(text)


def _number(name: str, *, low: int, high: int | None = None) -> int:
    text = os.environ.get(name, "")
    expected = f"at least {low}" if high is None else f"{low} to {high}"
    if (
        not (text.isascii() and text.isdecimal())
        or int(text) < low
        or (high is not None and int(text) > high)
    ):
        got = f"got {text!r}" if text else "it is not set"
        raise ConfigError(
            f"{name}: expected a number, {expected}, {got}; torchrun and the launch scripts set it"
        )
    return int(text)
