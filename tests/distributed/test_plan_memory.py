"""The plan's memory formula against the measured peak of real steps on a CPU: within 10 %."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.model.shape import read_architecture
from rlsc_mcore.planning.memory import Layout, activation_bytes, static_bytes

ALLOWED_ERROR = 0.10
CPU_HEAD_WORKSPACE = 16 << 20
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


def make_model(folder: Path, **sizes: int) -> Path:
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
DEEP = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("sizes", "recompute", "count", "length"),
    [
        (WIDE, "none", 4, 512),
        pytest.param(WIDE, "full", 8, 512, marks=pytest.mark.slow),
        pytest.param(WIDE, "selective", 4, 512, marks=pytest.mark.slow),
        pytest.param(DEEP, "none", 8, 256, marks=pytest.mark.slow),
        pytest.param(DEEP, "full", 8, 512, marks=pytest.mark.slow),
    ],
    ids=["wide none", "wide full", "wide selective", "deep none", "deep full"],
)
def test_the_peak_of_a_step_is_foretold(
    tmp_path: Path, sizes: dict[str, int], recompute: str, count: int, length: int
) -> None:
    folder = make_model(tmp_path / "model", vocab_size=4096, tie_word_embeddings=False, **sizes)
    command = [sys.executable, "-m", "tests.distributed.step_memory", str(folder), str(count), str(length)]
    environment = {**os.environ, **MALLOC}
    flags = ["--training.recompute", recompute]
    run = subprocess.run(
        [*command, *flags], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    shape = read_architecture(folder)
    layout = Layout(1, 1, recompute, "float32", tokens_per_micro_batch=measured["tokens"], fused_swiglu=False)
    planned = sum(static_bytes(shape, layout).values()) + activation_bytes(shape, layout) + CPU_HEAD_WORKSPACE
    error = planned / measured["peak"] - 1
    print(
        f"planned {planned / 2**20:.0f} MiB, measured {measured['peak'] / 2**20:.0f} MiB, error {error:+.1%}"
    )
    assert abs(error) < ALLOWED_ERROR
