"""Which GPU a process takes, the store of a world of one, and whom the other ranks wait for."""

import subprocess
import sys

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.parallel.backend import local_device_index
from rlsc_mcore.parallel.watchdog import behind_and_ahead


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)])
def test_a_process_takes_the_gpu_that_its_task_is_bound_to_or_its_own(
    local_rank: int, visible: int, index: int
) -> None:
    assert local_device_index(local_rank, visible) == index


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="LOCAL_RANK: process 3 of this node sees 2 GPUs; start one process per GPU"
    ):
        local_device_index(3, 2)


def test_a_world_of_one_meets_at_a_store_that_nccl_reads() -> None:
    """On a GPU the store is TCP on a free loopback port; here gloo joins by it, and the environment stays as
    it is."""
    program = """
import os, torch, torch.distributed as dist
from rlsc_mcore.parallel.rendezvous import meet
for name in ("RANK", "WORLD_SIZE"): os.environ.pop(name, None)
before = dict(os.environ)
assert type(meet(60)[0]).__name__ == "HashStore"
store, rank, world = meet(60, needs_address=True)
assert type(store).__name__ == "TCPStore" and store.port > 0 and (rank, world) == (0, 1)
other = meet(60, needs_address=True)[0]  # a second run on the same machine
assert other.port != store.port
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
tensor = torch.ones(2); dist.all_reduce(tensor); dist.barrier()
interfaces = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
assert dict(os.environ) == interfaces | before
print("joined", tensor.tolist())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0 and "joined [1.0, 1.0]" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("counts", "behind"),
    [
        ({0: {"world": 7}, 1: {"world": 7}, 2: {"world": 7}}, set()),
        ({0: {"world": 7}, 1: {"world": 6}, 2: {"world": 7}}, {1}),
        # Two tensor-parallel pairs (0, 1), (2, 3), data-parallel pairs (0, 2), (1, 3): rank 1 hangs; 0 waits
        # for it in their pair, so that 2 waits for 0, and 3 for 1.
        (
            {
                0: {"tp0": 5, "dp0": 2},
                1: {"tp0": 4, "dp1": 2},
                2: {"tp1": 5, "dp0": 3},
                3: {"tp1": 5, "dp1": 3},
            },
            {1},
        ),
        ({0: {"world": 9, "tp": 1}, 1: {"world": 9, "tp": 1}, 2: {"world": 8}}, {2}),
        ({0: {}, 1: {"world": 3}}, set()),
    ],
    ids=["all alike", "one late", "a chain of waits", "groups of unequal size", "nothing to compare"],
)
def test_who_is_behind_is_not_who_waits(counts: dict[int, dict[str, int]], behind: set[int]) -> None:
    found, ahead = behind_and_ahead(counts)
    assert found == behind and not found & ahead
