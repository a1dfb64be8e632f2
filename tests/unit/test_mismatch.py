"""The mismatch watch: statistics against numpy, limits by type, steps in a row."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsc_mcore.observability.mismatch import (
    GAPS,
    LIMITS,
    coarser,
    mismatch_warnings,
    mismatched_steps,
    stop_limit,
)
from rlsc_mcore.training.metrics_row import _gaps

# Measured, mean / p99 / largest per token. Honest: the embedded model and SmolLM2-135M, on a CPU, at
# temperature 0.5.
HONEST = [
    ("float32", 5.8e-8, 1.2e-6, 2.6e-6),
    ("float32", 4.7e-6, 4.2e-5, 8.2e-5),
    ("bfloat16", 8.6e-4, 4.2e-2, 6.0e-2),
    ("bfloat16", 4.2e-2, 3.6e-1, 8.3e-1),
]
# The embedded model's engine with permuted tensors of one step before (lr 1e-4), one wrong bias, one layer in
# the wrong order.
FAULTS = [
    ("float32", 4.5e-5, 1.0e-3, 5.7e-3),
    ("float32", 6.3e-4, 1.1e-2, 1.2e-1),
    ("float32", 1.9, 31.7, 43.9),
    ("bfloat16", 1.9, 31.8, 44.0),
]


def row(mean: float | None, p99: float | None = None, largest: float | None = None) -> dict[str, Any]:
    return {"log_prob_gap_mean": mean, "log_prob_gap_p99": p99, "log_prob_gap_max": largest}


@pytest.mark.parametrize(("dtype", "mean", "p99", "largest"), HONEST)
def test_an_honest_run_is_below_every_limit(dtype: str, mean: float, p99: float, largest: float) -> None:
    assert mismatch_warnings(row(mean, p99, largest), dtype) == []
    assert mismatch_warnings(row(2 * mean, 2 * p99, 2 * largest), dtype) == []  # with room
    assert mismatched_steps([row(2 * mean)], stop_limit(dtype, None)) == 0


@pytest.mark.parametrize(("dtype", "mean", "p99", "largest"), FAULTS)
def test_measured_faults_are_warned_of(dtype: str, mean: float, p99: float, largest: float) -> None:
    (warning,) = mismatch_warnings(row(mean, p99, largest), dtype)
    assert warning.startswith(
        f"trainer and engine disagree on the log-probs of the sampled tokens: {mean:.2e} on average "
        "(expected below"
    )


def test_a_warning_names_what_exceeds() -> None:
    (warning,) = mismatch_warnings(row(1e-6, 1e-3, 1e-4), "float32")
    assert warning.endswith(": 1.00e-03 at the 99th percentile (expected below 0.0003)")
    assert (
        mismatch_warnings(row(None), "float32") == [] == mismatch_warnings({}, "bfloat16")
    )  # not comparable
    assert len(mismatch_warnings(row(math.nan, 0.0, 0.0), "bfloat16")) == 1


def test_wrong_weights_stop_a_run_and_rounding_does_not() -> None:
    for dtype, limits in LIMITS.items():
        assert limits.mean < limits.p99 < limits.largest and limits.mean < limits.stop == stop_limit(
            dtype, None
        )
        wrong = [mean for name, mean, *_ in FAULTS if name == dtype and mean > 1]
        assert min(wrong) > 3 * limits.stop
    assert stop_limit("bfloat16", 0.01) == 0.01
    assert coarser("float32", "float32") == "float32" and coarser(
        "float32", "bfloat16"
    ) == "bfloat16" == coarser("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("means", "count"),
    [
        ([], 0),
        ([9.0], 1),
        ([9.0, 0.1], 0),
        ([0.1, 9.0, 9.0], 2),
        ([9.0, None, 9.0], 1),
        ([math.nan, math.nan], 2),
        ([1.0], 0),
    ],
)
def test_mismatched_steps_are_counted_from_the_end(means: list[float | None], count: int) -> None:
    assert mismatched_steps([row(mean) for mean in means], 1.0) == count


ALONE: Any = SimpleNamespace(reduce_over_dp=lambda values, op=None: values)  # one data-parallel rank


@given(
    st.lists(st.floats(0, 50, width=32), min_size=1, max_size=400),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
)
def test_statistics_against_numpy(gaps: list[float], sums: list[float]) -> None:
    scores: Any = SimpleNamespace(
        token_gaps=torch.tensor(gaps, dtype=torch.float32), gap_sums=torch.tensor(sums, dtype=torch.float64)
    )
    found, tokens, sequences = _gaps(scores, ALONE), np.array(gaps, np.float32), np.abs(sums)
    expected = (
        tokens.mean(dtype=np.float64),
        np.quantile(tokens, 0.99, method="inverted_cdf"),
        tokens.max(),
        sequences.mean(),
        sequences.max(),
    )
    assert tuple(found) == GAPS and tuple(found.values()) == pytest.approx(
        tuple(map(float, expected)), rel=1e-12
    )


def test_a_step_without_tokens_differs_by_nothing() -> None:
    scores: Any = SimpleNamespace(token_gaps=torch.zeros(0), gap_sums=torch.zeros(0))
    assert set(_gaps(scores, ALONE).values()) == {0.0}
