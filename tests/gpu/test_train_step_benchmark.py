"""The training-step benchmark on a GPU: its gate holds, its parts add up, its utilisation is a share of the
card's peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "--shape",
    "qwen2.5-0.5b",
    "--layers",
    "4",
    "--sequences",
    "8",
    "--sequence-length",
    "1024",
    "--repeats",
    "2",
]


@pytest.mark.parametrize(
    "flags",
    [[], ["--model.layers", "torch"], ["--training.recompute", "full", "--ragged"]],
    ids=["auto", "torch", "full"],
)
def test_a_small_shape(tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_train_step", *SMALL, *flags, "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "train_step_qwen2.5-0.5b.json").read_text(encoding="utf-8"))
    parts = {part: value for part, value in result["share"].items() if part != "of it in collectives"}
    assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(1, abs=1e-3)
    assert result["share"]["of it in collectives"] == 0
    assert 0 < result["utilisation"]["share_of_measured_gemm"] < 1
    mfu = result["utilisation"]["mfu"]
    assert mfu is None or 0 < mfu < 1
    # Weights, gradients, masters and moments of every parameter lie on the device: 18 bytes each in bfloat16.
    assert (
        result["memory"]["device_reserved"]
        >= result["memory"]["device_peak"]
        > 18 * result["step"]["parameters"]
    )
