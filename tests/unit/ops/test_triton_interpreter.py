"""The Triton kernels on a CPU: the same tests once more in Triton's interpreter, in a process of their
own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = (
    "test_token_log_probs.py",
    "test_row_ops.py",
    "test_sequence_sums.py",
    "test_linear_weighted_loss.py",
    "test_linear_kl_loss.py",
    "test_block_copy.py",
    "test_not_finite.py",
    "test_common_offset.py",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(
    "RLSC_TEST_PLACEMENTS" in os.environ, reason="already in a process with chosen placements"
)
def test_every_kernel_in_the_interpreter():
    """TRITON_INTERPRET is read when triton is imported, so this process cannot do it itself."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "RLSC_TEST_PLACEMENTS": "cpu:triton",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "placement or cpu-triton",
        *(str(HERE / name) for name in MODULES),
    ]
    run = subprocess.run(
        command,
        env=environment,
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed.group(1)) >= 60, f"only {passed.group(0)}: the Triton placements were not tested"
    assert "skipped" not in run.stdout, run.stdout
