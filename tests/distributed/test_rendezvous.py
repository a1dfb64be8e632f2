"""Ranks that cannot meet end within the time limit, in one line; those that can listen on the loopback
interface only."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MEET = """
import os, sys
from rlsc_mcore.config import ConfigError, RunError
from rlsc_mcore.parallel.rendezvous import meet
try:
    meet(float(os.environ["LIMIT"]))
    print("met")
except (ConfigError, RunError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def meet(limit_s: float, **environment: object) -> "subprocess.Popen[str]":
    settings = {
        "LIMIT": limit_s,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
    }
    variables = {
        **os.environ,
        **{name: str(value) for name, value in {**settings, **environment}.items() if value is not None},
    }
    for name in [name for name, value in environment.items() if value is None]:
        variables.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", MEET], env=variables, stdout=subprocess.PIPE, text=True
    )


def line(process: "subprocess.Popen[str]") -> str:
    (printed,) = process.communicate(timeout=120)[0].splitlines()
    return str(printed)


@contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield port


def test_a_rank_that_never_comes_is_named() -> None:
    with free_port() as port:
        first = meet(4, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, MASTER_PORT=port)
        second = meet(4, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, MASTER_PORT=port, RANK=1)
        said = [line(first), line(second)]
    text = f"CollectiveRunError: rendezvous at 127.0.0.1:{port}: 1 of 3 ranks did not come within 4 s (RLSC_RENDEZVOUS_TIMEOUT_S): rank 2"
    assert text in said, said  # a rank that starts late may find the first one gone
    assert all(f"rendezvous at 127.0.0.1:{port}" in each for each in said)


def test_a_missing_rank_0_is_named() -> None:
    with free_port() as port:
        said = line(meet(3, MASTER_PORT=port, RANK=1))
    assert said.startswith(
        f"RunError: rendezvous at 127.0.0.1:{port}: rank 1 found no rank 0 there within 3 s"
    ), said


def test_a_taken_port_is_named_at_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = line(meet(60, MASTER_PORT=port))
    assert said.startswith(
        f"RunError: rendezvous at 127.0.0.1:{port}: the port is taken by another program"
    ), said


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("MASTER_PORT", "0", "MASTER_PORT: expected a number, 1 to 65535, got '0'"),
        ("MASTER_PORT", "70000", "MASTER_PORT: expected a number, 1 to 65535, got '70000'"),
        ("MASTER_PORT", "http", "MASTER_PORT: expected a number, 1 to 65535, got 'http'"),
        ("MASTER_PORT", None, "MASTER_PORT: expected a number, 1 to 65535, it is not set"),
        ("WORLD_SIZE", "two", "WORLD_SIZE: expected a number, at least 1, got 'two'"),
        ("RANK", "2", "RANK: 2 is not below WORLD_SIZE = 2"),
        ("RANK", "-1", "RANK: expected a number, at least 0, got '-1'"),
    ],
)
def test_variables_that_no_launcher_sets_are_bad_input(variable: str, value: str | None, said: str) -> None:
    assert line(meet(60, **{"MASTER_PORT": 29777, variable: value})).startswith(f"ConfigError: {said}")


def sockets_of_this_process() -> list[tuple[str, int]]:
    """Addresses that this process listens on, from /proc."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found = re.match(r"socket:\[(\d+)\]", os.readlink(descriptor))
        except OSError:
            continue
        inodes |= {found[1]} if found else set()
    listening = []
    for table in ("tcp", "tcp6"):
        for row in [row.split() for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]:
            if row[3] == "0A" and row[9] in inodes:
                address, port = row[1].split(":")
                listening.append((address, int(port, 16)))
    return listening


LOOPBACK = "0100007F"
GROUPS = """
import json, os, sys
from rlsc_mcore.observability.console import quiet_libraries
quiet_libraries()
from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.parallel.groups import initialize_groups
from tests.distributed.test_rendezvous import sockets_of_this_process
groups = initialize_groups(get_backend(), 1)
gathered = groups.gather_objects({"rank": groups.rank, 0.5: (groups.rank,)})
assert gathered == [{"rank": rank, 0.5: (rank,)} for rank in range(groups.world_size)], gathered
assert groups.max(float(groups.rank)) == groups.world_size - 1
groups.barrier()
print(json.dumps([sockets_of_this_process(), len(os.listdir("/proc/self/task"))]), flush=True)
groups.barrier()
os._exit(0)
"""


def run_groups(world: int, environment: dict[str, Any]) -> list[Any]:
    import json

    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {name: value for name, value in os.environ.items() if name not in launcher}
    processes = []
    for rank in range(world):
        own = (
            {}
            if world == 1
            else {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                **environment,
            }
        )
        variables = base | {name: str(value) for name, value in own.items()}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", GROUPS],
                env=variables,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]


def test_a_single_process_has_one_listener_on_the_loopback_interface() -> None:
    ((sockets, threads),) = run_groups(1, {})
    assert len(sockets) <= 1 and all(address == LOOPBACK for address, _ in sockets), sockets
    assert threads < 60


def test_ranks_of_one_node_listen_on_the_loopback_interface_only() -> None:
    """Even where the launcher names the host, as a cluster's does."""
    with free_port() as port:
        for sockets, _ in run_groups(2, {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": port}):
            assert sockets and all(address == LOOPBACK for address, _ in sockets), sockets
