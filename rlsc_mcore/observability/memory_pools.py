"""Account for memory by owner at each phase boundary of a step.

A table has one row per phase boundary (`BORDERS`) and one column per pool (`POOLS`), in bytes. A value is
None if the device has no such pool (a CPU has no CUDA graphs and no caching allocator). On a GPU a row adds
up to the memory of the device. On a CPU all pools but `free` add up to the resident set of the process.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Pools = dict[str, int | None]
Table = dict[str, Pools]  # phase boundary -> pools

BORDERS = {
    "rollout": "all answers are sampled",
    "sleep": "the engine sleeps and the trainer begins",
    "train": "the update is made",
    "release": "the trainer has let go of its workspace and the engine is to be woken",
    "swap": "the engine is awake on the new weights",
}
POOLS = {
    "weights": "the trainer's parameters, which the engine shares",
    "gradients": "gradient buffers, which hold nothing while the engine samples",
    "optimizer": "moments and fp32 master weights on the device",
    "engine_weights": "the engine's own parameters and buffers",
    "kv_cache": "keys and values",
    "cuda_graphs": "the engine's captured graphs",
    "workspace": "live tensors that are none of the above",
    "activations_cached": "blocks that the allocator keeps free: activations of before",
    "other": "the process's remaining memory; on a GPU also contexts, collectives and other processes",
    "free": "free on the device; on a CPU available on the machine",
}
RESIDUE_BORDERS = ("sleep", "release")  # phase boundaries at which engine or trainer have released memory
GROWTH_PER_STEP = 0.01
STEPS_OF_GROWTH = 3  # consecutive steps: a buffer that is allocated late grows once, a leak at every step
SMALLEST_GROWTH_BYTES = 1 << 20  # smaller changes come from the rounding of the allocator
SMALLEST_GROWTH_OF_OTHER_BYTES = 16 << 20  # larger, because `other` includes other processes


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the storages of torch tensors as address -> bytes.

    Views of the same storage count once; empty storages are left out.
    """
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def device_pools(
    owned: Mapping[str, Mapping[int, int]],
    segments: Sequence[Mapping[str, Any]],
    graph_pool: tuple[int, int] | None,
    *,
    total: int,
    free: int,
) -> Pools:
    """Return the memory of a GPU in bytes by pool.

    `owned` maps a pool to the storages of its owner (address -> bytes). `segments` is the caching allocator's
    snapshot of this device (`torch.cuda.memory_snapshot`). `graph_pool` is the id of the pool in which CUDA
    graphs were captured. `total` and `free` are those of the device, in bytes.
    """
    default = [segment for segment in segments if tuple(segment["segment_pool_id"]) == (0, 0)]
    pools: Pools = {name: sum(tensors.values()) for name, tensors in owned.items()}
    live = sum(segment["allocated_size"] for segment in default)
    known = sum(_inside(default, tensors) for tensors in owned.values())
    pools["cuda_graphs"] = sum(
        segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == graph_pool
    )
    pools["workspace"] = max(0, live - known)
    pools["activations_cached"] = sum(segment["total_size"] for segment in default) - live
    pools["other"] = max(0, total - free - sum(value or 0 for value in pools.values()))
    pools["free"] = free
    return {name: pools.get(name, 0) for name in POOLS}


def host_pools(owned: Mapping[str, Mapping[int, int]], *, resident: int, available: int) -> Pools:
    """Return the memory of a CPU process in bytes by pool.

    `owned` maps a pool to the storages of its owner. `other` is the rest of the resident set; `free` is the
    available memory of the machine.
    """
    pools: Pools = {name: sum(tensors.values()) for name, tensors in owned.items()}
    pools["other"] = max(0, resident - sum(value or 0 for value in pools.values()))
    pools["free"] = available
    return {name: pools.get(name) for name in POOLS}


def worst_of(tables: Sequence[Table]) -> Table:
    """Combine the tables of several ranks: the maximum of each pool, and the minimum of `free`."""
    worst: Table = {}
    for border in tables[0]:
        rows = [table[border] for table in tables if border in table]
        worst[border] = {name: _extreme(name, [row[name] for row in rows]) for name in POOLS}
    return worst


def growth_warnings(tables: Sequence[Table]) -> list[str]:
    """Return a warning for every pool that looks like a memory leak.

    A pool leaks if it grows by more than 1 % in each of the last three steps at one of `RESIDUE_BORDERS`.
    `tables` are the tables of one process, oldest first. The pool `other` is not checked on a CPU: it depends
    on the C allocator and is stable only after tens of steps.
    """
    recent = tables[-STEPS_OF_GROWTH - 1 :]
    found: dict[str, str] = {}
    for border in RESIDUE_BORDERS:
        rows = [table.get(border, {}) for table in recent]
        is_host = all(row.get("workspace") is None for row in rows)
        for pool in POOLS:
            sizes = [size for row in rows if (size := row.get(pool)) is not None]
            if pool == "free" or pool in found or (pool == "other" and is_host) or not _grows(sizes, pool):
                continue
            found[pool] = (
                f"memory of {pool} grows: {_mib(sizes[0])} to {_mib(sizes[-1])} MiB in {STEPS_OF_GROWTH} "
                f"steps, after '{border}' "
                f"({POOLS[pool]})"
            )
    return list(found.values())


def _grows(sizes: Sequence[int], pool: str) -> bool:
    floor = SMALLEST_GROWTH_OF_OTHER_BYTES if pool == "other" else SMALLEST_GROWTH_BYTES
    steps = list(itertools.pairwise(sizes))
    return len(steps) == STEPS_OF_GROWTH and all(
        after - before > max(floor, GROWTH_PER_STEP * before) for before, after in steps
    )


def _inside(segments: Sequence[Mapping[str, Any]], tensors: Mapping[int, int]) -> int:
    """Return the bytes of the tensors that lie in these segments."""
    ordered = sorted(segments, key=lambda segment: segment["address"])
    starts = [segment["address"] for segment in ordered]
    held = 0
    for address, size in tensors.items():
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < starts[index] + ordered[index]["total_size"]:
            held += size
    return held


def _extreme(pool: str, values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return min(known) if pool == "free" else max(known)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
