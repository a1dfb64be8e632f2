"""Memory that was freed is given back between the phases of a step, on a CPU too."""

from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks

MIB = 1 << 20


def resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def free_below_a_block_in_use() -> tuple[int, int, int]:
    """Resident bytes with 128 MiB of small tensors, after freeing all but the last, and after the release."""
    from rlsc_mcore.parallel.backend import get_backend

    backend = get_backend()
    backend.release_cached_memory()
    tensors = [
        torch.ones(16 * 1024) for _ in range(2048)
    ]  # 64 KiB: below malloc's threshold for a mapping of its own
    held = resident()
    del tensors[:-1]
    freed = resident()
    backend.release_cached_memory()
    return held, freed, resident()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the caching allocator is meant, not the host's"
)
def test_freed_host_memory_goes_back() -> None:
    ((held, freed, released),) = run_ranks(1, free_below_a_block_in_use)
    assert held - freed < 16 * MIB, "malloc gives this back by itself: the test shows nothing"
    assert held - released > 112 * MIB
