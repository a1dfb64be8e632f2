"""The size of the KV cache: configured, wanted, or what is free, and never too small for one sequence."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlsc_mcore.config import ConfigError, RolloutConfig
from rlsc_mcore.rollout.engine import GPU_KV_CACHE_SHARE, kv_cache_bytes

GIB = 1 << 30


def size(
    *, free_gib: float | None = None, context: int = 4096, per_token: int = 57344, **options: float
) -> float:
    rollout = RolloutConfig(**options)  # type: ignore[arg-type]
    free = None if free_gib is None else int(free_gib * GIB)
    return kv_cache_bytes(rollout, free_bytes=free, max_model_len=context, kv_bytes_per_token=per_token) / GIB


def test_what_the_sequences_need_is_enough() -> None:
    """7B: 57344 bytes per token; 256 sequences of 4096 tokens and a block to spare for each."""
    assert size(free_gib=1000) == pytest.approx(57344 * (4096 + 32) * 256 / GIB, abs=0.001)
    assert size(free_gib=1000, max_num_seqs=32) == pytest.approx(size(free_gib=1000) / 8, abs=0.001)


def test_at_most_a_share_of_what_is_free() -> None:
    assert size(free_gib=100) == pytest.approx(40, abs=0.01) and size(free_gib=50) == pytest.approx(
        20, abs=0.01
    )
    assert size(free_gib=50, kv_cache_gib=33) == 33  # what is asked for is not second-guessed


def test_a_cpu_has_limits_of_its_own() -> None:
    assert size() == 4
    assert size(context=64, per_token=1024) == 64 / 1024


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"kv_cache_gib": 0.1},
            "rollout.kv_cache_gib: 0.1 GiB as configured hold 1872 tokens, fewer than one longest sequence "
            "of 4096",
        ),
        ({"free_gib": 0.3}, "rollout.kv_cache_gib: 0.119 GiB of what is free hold 2230 tokens"),
    ],
)
def test_less_than_one_sequence_is_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        size(**options)  # type: ignore[arg-type]


@example(
    free_gib=1.0, context=2685, per_token=24994, num_seqs=1
)  # what is wanted is rounded up, what is free down
@given(st.floats(1, 500), st.integers(2, 10**5), st.integers(64, 10**6), st.integers(1, 2048))
def test_any_size_is_within_its_limits(free_gib: float, context: int, per_token: int, num_seqs: int) -> None:
    try:
        found = size(free_gib=free_gib, context=context, per_token=per_token, max_num_seqs=num_seqs) * GIB
    except ConfigError:
        assert per_token * context > GPU_KV_CACHE_SHARE * free_gib * GIB - (1 << 20)
        return
    assert per_token * context <= found <= GPU_KV_CACHE_SHARE * free_gib * GIB and found % (1 << 20) == 0
