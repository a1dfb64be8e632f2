"""The Hopper kernel on a CPU: its source runs on simulated blocks whose copies and messages arrive late.

The kernel file is compiled as it is but for what no C++ compiler knows: shared memory, the launch bounds, one
line of PTX.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cluster_simulation"
SOURCE = Path(__file__).parents[3] / "csrc" / "cuda"
SHARED = "*reinterpret_cast<{type}(*){extents}>(device::block->variables + {offset});"

COMMON = {
    "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n": "",
    'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "y = exp2f(x);",
}
KERNEL = {
    '#include "common.cuh"\n#include "hopper.cuh"\n': "",
    "extern __shared__ __align__(128) unsigned char buffers[];": "unsigned char* buffers = device::block->dynamic();",
    "__shared__ uint64_t loaded[kMaxStages * kParts];": "auto& loaded = "
    + SHARED.format(type="uint64_t", extents="[kMaxStages * kParts]", offset=0),
    "__shared__ uint64_t arrived[2];": "auto& arrived = "
    + SHARED.format(type="uint64_t", extents="[2]", offset=512),
    "__shared__ float4 peers[2 * kMaxCluster];": "auto& peers = "
    + SHARED.format(type="float4", extents="[2 * kMaxCluster]", offset=1024),
    "__shared__ Mass warps[kWarps];": "auto& warps = "
    + SHARED.format(type="Mass", extents="[kWarps]", offset=2048),
    "__shared__ float found_target;": "auto& found_target = *reinterpret_cast<float*>(device::block->variables + 4096);",
    "__global__ void __launch_bounds__(kThreads, 1536 / kThreads) cluster_rows": "void cluster_rows",
}
CASES = 16


def prepare(name: str, changes: dict[str, str]) -> str:
    """A kernel file with each change made exactly once."""
    text = (SOURCE / name).read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, f"{name} has changed: expected {old!r} once"
        text = text.replace(old, new)
    return text


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_cluster_kernel_computes_every_element_on_simulated_blocks(tmp_path):
    kernel = '#include "device.h"\n' + prepare("common.cuh", COMMON) + prepare("rows_cluster.cuh", KERNEL)
    (tmp_path / "kernel.h").write_text(kernel)
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-pthread",
        "-w",
        f"-I{tmp_path}",
        f"-I{HERE}",
        str(HERE / "main.cpp"),
        "-o",
        str(tmp_path / "run"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert built.returncode == 0, built.stderr[:4000]
    run = subprocess.run([str(tmp_path / "run")], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count(": ok") == CASES, run.stdout
