"""The memory table: what a GPU's allocator says, by owner; the fullest rank; and growth that is a leak."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.observability.memory_pools import (
    BORDERS,
    GROWTH_PER_STEP,
    POOLS,
    RESIDUE_BORDERS,
    STEPS_OF_GROWTH,
    Table,
    device_pools,
    growth_warnings,
    host_pools,
    storages,
    worst_of,
)

MIB = 1 << 20


def segment(address: int, total: int, live: int, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """What torch.cuda.memory_snapshot says of a block of device memory."""
    return {
        "address": address,
        "total_size": total * MIB,
        "allocated_size": live * MIB,
        "segment_pool_id": pool,
        "device": 0,
    }


def test_a_gpu_is_accounted_for_to_the_last_byte() -> None:
    """Trainer in the allocator's own pool; CUDA graphs and vLLM's sleep pool, whose cache is unmapped, in
    theirs."""
    owned = {
        "weights": {1000 * MIB: 100 * MIB},
        "gradients": {1100 * MIB: 200 * MIB},
        "optimizer": {3000 * MIB: 60 * MIB},
        "engine_weights": {9000 * MIB: 20 * MIB},  # mapped in the sleep pool
        "kv_cache": {},  # asleep
    }
    segments = [
        segment(3000 * MIB, 500, 90),
        segment(1000 * MIB, 400, 310),
        segment(9000 * MIB, 2000, 2000, (0, 7)),  # the sleep pool: counted by torch, mapped or not
        segment(8000 * MIB, 64, 0, (0, 5)),  # captured graphs keep what they freed
    ]
    pools = device_pools(owned, segments, (0, 5), total=80_000 * MIB, free=78_000 * MIB)
    assert list(pools) == list(POOLS)
    assert {name: size // MIB for name, size in pools.items() if size is not None} == {
        "weights": 100, "gradients": 200, "optimizer": 60, "engine_weights": 20, "kv_cache": 0, "cuda_graphs": 64,
        "workspace": 310 + 90 - 360, "activations_cached": 90 + 410, "other": 2000 - 100 - 200 - 60 - 20 - 64 - 40 - 500, "free": 78_000,
    }  # fmt: skip
    assert sum(size or 0 for size in pools.values()) == 80_000 * MIB
    without = device_pools(owned, segments, None, total=80_000 * MIB, free=78_000 * MIB)
    assert without["cuda_graphs"] == 0 and without["other"] == (pools["other"] or 0) + 64 * MIB


def test_an_engine_that_never_sleeps_lies_in_the_allocators_own_pool() -> None:
    owned = {
        "weights": {0: 10 * MIB},
        "engine_weights": {10 * MIB: 5 * MIB},
        "kv_cache": {20 * MIB: 30 * MIB},
    }
    pools = device_pools(owned, [segment(0, 64, 47)], None, total=100 * MIB, free=30 * MIB)
    assert (pools["workspace"], pools["activations_cached"], pools["other"]) == (2 * MIB, 17 * MIB, 6 * MIB)


def test_a_cpu_has_no_allocator_to_ask() -> None:
    pools = host_pools({"weights": {0: 10}, "kv_cache": {1: 20}}, resident=100, available=1000)
    assert pools == dict.fromkeys(POOLS) | {"weights": 10, "kv_cache": 20, "other": 70, "free": 1000}


def test_views_count_once() -> None:
    base = torch.zeros(100)
    assert (
        sum(
            storages(
                [base, base[10:20], base.view(10, 10), torch.zeros(0), torch.zeros(3, dtype=torch.int8)]
            ).values()
        )
        == 403
    )


def test_the_fullest_rank_is_shown() -> None:
    first: Table = {"train": dict.fromkeys(POOLS, 5)}
    second: Table = {"train": dict.fromkeys(POOLS, 7) | {"cuda_graphs": None, "weights": 1}}
    third: Table = {"train": dict.fromkeys(POOLS, 6) | {"cuda_graphs": None}}
    worst = worst_of([first, second, third])
    assert worst == {"train": dict.fromkeys(POOLS, 7) | {"weights": 6, "cuda_graphs": 5, "free": 5}}
    assert worst_of([{"train": dict.fromkeys(POOLS)}]) == {"train": dict.fromkeys(POOLS)}


def tables(pool: str, sizes: list[float], border: str = "release") -> list[Table]:
    """Steps of a GPU in which one pool has these MiB at one border."""
    steady = {name: dict.fromkeys(POOLS, 100 * MIB) for name in BORDERS}
    return [{**steady, border: steady[border] | {pool: int(size * MIB)}} for size in sizes]


@pytest.mark.parametrize("border", RESIDUE_BORDERS)
@pytest.mark.parametrize("pool", sorted(set(POOLS) - {"free", "other"}))
def test_a_leak_is_named(pool: str, border: str) -> None:
    (warning,) = growth_warnings(tables(pool, [500, 500, 510, 520, 530], border))
    assert (
        warning == f"memory of {pool} grows: 500.0 to 530.0 MiB in 3 steps, after '{border}' ({POOLS[pool]})"
    )


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ([500, 510, 520], "too few steps to tell"),
        ([500, 600, 600, 600, 600], "a buffer that was built late"),
        ([500, 510, 520, 520.5], "less than 1 %"),
        ([500, 510, 505, 515, 520], "it shrank in between"),
        ([500, 504, 508, 512], "0.8 % a step"),
        ([1, 1.5, 2, 2.5], "the allocator's rounding"),
        ([600, 500, 400, 300], "it shrinks"),
    ],
)
def test_what_is_no_leak_is_not(sizes: list[float], why: str) -> None:
    assert growth_warnings(tables("workspace", sizes)) == [], why


def test_growth_elsewhere_in_the_step_is_no_leak() -> None:
    for border in set(BORDERS) - set(RESIDUE_BORDERS):
        assert growth_warnings(tables("activations_cached", [100, 200, 300, 400], border)) == []
    assert growth_warnings(tables("free", [100, 200, 300, 400])) == []


def test_other_is_judged_where_it_is_known() -> None:
    assert len(growth_warnings(tables("other", [100, 150, 200, 250]))) == 1
    assert growth_warnings(tables("other", [100, 110, 120, 130])) == []  # 10 MiB may be another process
    on_a_cpu = tables("other", [100, 150, 200, 250])
    for table in on_a_cpu:
        for row in table.values():
            row["workspace"] = None
    assert growth_warnings(on_a_cpu) == []


@given(st.integers(10, 10**5), st.floats(0.0, 0.05), st.integers(STEPS_OF_GROWTH + 1, 12))
def test_steady_growth_is_found_exactly_above_its_limit(start: int, rate: float, steps: int) -> None:
    sizes = [start * (1 + rate) ** step for step in range(steps)]
    last = [int(size * MIB) for size in sizes[-STEPS_OF_GROWTH - 1 :]]
    expected = all(b - a > GROWTH_PER_STEP * a and b - a > MIB for a, b in itertools.pairwise(last))
    assert bool(growth_warnings(tables("weights", sizes))) == expected
