"""Builds the native row ops (rlsc_mcore/_C) where it can, and says in one line what it did; an install never fails over them.

    pip install --no-build-isolation .          against the installed torch
    python setup.py build_ext --inplace         into the checkout

A C++ compiler gives the CPU ops, nvcc beside a torch built for CUDA the GPU ops too. RLSC_NATIVE=off|cpu|cuda narrows or
demands (a demanded build that fails is an error). TORCH_CUDA_ARCH_LIST overrides the GPU architectures.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("RLSC_NATIVE", "auto")
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # stable ABI of torch 2.10 and later
CXX_FLAGS = ["-std=c++20", "-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fvisibility=hidden", TARGET_VERSION]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", TARGET_VERSION]
EVERY_ARCH = "8.0;9.0;10.0;12.0+PTX"


def say(line: str) -> None:
    print(f"rlsc_mcore native ops: {line}", file=sys.stderr, flush=True)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def extension(with_cuda: bool) -> tuple[list[Any], dict[str, Any]]:
    """The extension and the command that builds it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kind = CUDAExtension if with_cuda else CppExtension
    files = sources("*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if with_cuda else []))
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if with_cuda else CXX_FLAGS
    ext = kind("rlsc_mcore._C", files, extra_compile_args=flags, extra_link_args=["-Wl,-s"], py_limited_api=True)

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
                say(f"built for {'CPU and CUDA' if with_cuda else 'CPU'}")
            except Exception as error:  # no install may fail over a kernel: the ops fall back to Triton and PyTorch
                if WANTED in ("cpu", "cuda"):
                    raise
                lines = str(error).splitlines() or [type(error).__name__]
                say(f"not built ({lines[0][:200]}); the ops run in {'Triton and ' if with_cuda else ''}PyTorch")

    return [ext], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


def native() -> tuple[list[Any], dict[str, Any]]:
    """What to build here, and the reason where nothing is."""
    if WANTED == "off":
        say("not built (RLSC_NATIVE=off)")
        return [], {}
    try:
        import torch
    except ImportError:
        say("not built (torch is not installed in the build environment; use pip install --no-build-isolation)")
        return [], {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        say("not built (no C++ compiler: install one or set CXX)")
        return [], {}
    from torch.utils.cpp_extension import CUDA_HOME

    has_nvcc = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    with_cuda = torch.version.cuda is not None and has_nvcc and WANTED != "cpu"
    if with_cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        os.environ["TORCH_CUDA_ARCH_LIST"] = {0: EVERY_ARCH}.get(major, f"{major}.{minor}")
    return extension(with_cuda)


ext_modules, cmdclass = native()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
