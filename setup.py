"""Build the native row ops (rlsc_mcore/_C) where the machine can, and print in one line what was built and
why.

    pip install --no-build-isolation .          against the installed torch
    python setup.py build_ext --inplace         into the checkout

A C++ compiler gives the CPU ops. An nvcc of the CUDA major version that torch was built for gives the GPU ops
too. The first fitting one is taken of CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and the environment's
package nvidia-cuda-nvcc.

RLSC_NATIVE=auto (default)  build what the machine can; where the CUDA build fails, build the CPU ops; never fail the install
RLSC_NATIVE=cpu, cuda       fail with the reason where this build is not possible
RLSC_NATIVE=off             build nothing
TORCH_CUDA_ARCH_LIST        GPU architectures; default: the GPU of this machine, else every supported one
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("RLSC_NATIVE", "auto")
NATIVE_CHOICES = ("auto", "cpu", "cuda", "off")
NOTE = "_C.build.txt"  # beside the extension: what was built and why, for `rlsc doctor`
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # stable ABI of torch 2.10 and later
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    TARGET_VERSION,
]
# Every Python version from 3.11 on loads the extension: it uses the limited API and torch's stable ABI.
WHEEL_TAG = {"bdist_wheel": {"py_limited_api": "cp311"}}
PACKAGES = [
    *find_packages(str(ROOT), include=["rlsc_mcore", "rlsc_mcore.*"], exclude=["rlsc_mcore.assets.make"]),
    "rlsc_mcore.configs",
    "rlsc_mcore.launch",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", TARGET_VERSION]
EVERY_ARCH = "8.0;9.0;10.0;12.0+PTX"


def report(line: str) -> None:
    """Print the line that launch/install.sh repeats."""
    print(f"rlsc_mcore native ops: {line}", file=sys.stderr, flush=True)


def refuse(reason: str) -> None:
    """Report that nothing is built; exit with the reason where the build was demanded."""
    if NATIVE in ("cpu", "cuda"):
        raise SystemExit(f"rlsc_mcore native ops: error: RLSC_NATIVE={NATIVE}: {reason}")
    report(f"not built ({reason})")


def cuda_toolkits() -> Iterator[Path]:
    """Yield every folder that may hold bin/nvcc, in the order of preference."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path).resolve().parents[1]
    yield Path("/usr/local/cuda")
    for scheme in ("purelib", "platlib"):
        yield from sorted(Path(sysconfig.get_path(scheme), "nvidia").glob("cu*"))


def nvcc_version(toolkit: Path) -> str | None:
    """Return the release of the toolkit's nvcc as "13.0"; None where there is no nvcc that starts."""
    try:
        done = subprocess.run(
            [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release.group(1) if release else None


def choose_toolkit(torch_cuda: str) -> tuple[Path | None, str]:
    """Return the toolkit whose nvcc has the major version of `torch_cuda`; where there is none, None and the
    reason."""
    others: dict[Path, str] = {}
    for toolkit in cuda_toolkits():
        version = nvcc_version(toolkit)
        if version is None or toolkit in others:
            continue
        if not (toolkit / "include" / "cuda_runtime.h").exists():
            others[toolkit] = f"CUDA {version} in {toolkit} has no headers"
        elif version.partition(".")[0] != torch_cuda.partition(".")[0]:
            others[toolkit] = f"CUDA {version} in {toolkit} is another major version"
        else:
            return toolkit, ""
    needed = f"torch was built for CUDA {torch_cuda}"
    if others:
        return (
            None,
            f"{needed}, and no nvcc fits: {'; '.join(others.values())}; set CUDA_HOME to a toolkit that does",
        )
    return None, f"{needed}, and no nvcc was found; install the package nvidia-cuda-nvcc or set CUDA_HOME"


def link_folder(toolkit: Path) -> tempfile.TemporaryDirectory[str] | None:
    """Return a folder with libcudart.so where the toolkit has the versioned file only, as the packages of
    nvidia do."""
    if any((toolkit / name / "libcudart.so").exists() for name in ("lib64", "lib")):
        return None
    versioned = sorted((toolkit / "lib").glob("libcudart.so.*"))
    if not versioned:
        return None
    folder = tempfile.TemporaryDirectory(prefix="rlsc-cudart-")
    Path(folder.name, "libcudart.so").symlink_to(versioned[0])
    return folder


def sources(*patterns: str) -> list[str]:
    """Return the paths of the C++ and CUDA files, relative to the project."""
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern)
    )


def cpu_extension() -> Any:
    """Return the extension with the CPU ops only."""
    from torch.utils.cpp_extension import CppExtension

    files = sources("*.cpp", "cpu/*.cpp")
    return CppExtension(
        "rlsc_mcore._C", files, extra_compile_args=CXX_FLAGS, extra_link_args=["-Wl,-s"], py_limited_api=True
    )


def cuda_extension(library_folders: list[str]) -> Any:
    """Return the extension with the CPU and the GPU ops."""
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "rlsc_mcore._C",
        sources("*.cpp", "cpu/*.cpp", "cuda/*.cu"),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,-s"],
        library_dirs=library_folders,
        py_limited_api=True,
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def build_command(toolkit: Path | None, cpu_reason: str, links: Any) -> Any:
    """Return the build_ext command.

    It builds for CUDA where `toolkit` is given, else for the CPU with the reason `cpu_reason`. `links` is the
    folder of `link_folder`, which must exist until the extension is linked.
    """
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            reason = cpu_reason
            before = {
                name: getattr(self, name) for name in ("compiler", "inplace")
            }  # which a failed run() leaves changed
            if toolkit is not None:
                try:
                    super().run()
                    self.note(f"built for CPU and CUDA with {toolkit}/bin/nvcc")
                    return
                except Exception as error:
                    if NATIVE == "cuda":
                        raise
                    reason = f"the CUDA build failed: {first_line(error)}"
                    vars(self).update(before)
                    # setuptools keeps facts of its own on the extension: change it in place.
                    vars(self.extensions[0]).update(vars(cpu_extension()))
            try:
                super().run()
                self.note(f"built for CPU only ({reason})")
            except (
                Exception
            ) as error:  # an install must not fail because of a kernel: the ops have PyTorch implementations
                if NATIVE == "cpu":
                    raise
                report(
                    f"not built ({first_line(error)}); the ops use PyTorch{' and Triton' if toolkit else ''}"
                )

        def note(self, line: str) -> None:
            report(line)
            in_place = self.inplace or getattr(self, "editable_mode", False)
            folder = ROOT if in_place else Path(self.build_lib)
            (folder / "rlsc_mcore").mkdir(parents=True, exist_ok=True)
            (folder / "rlsc_mcore" / NOTE).write_text(line + "\n", encoding="utf-8")

    Build.links = links
    return Build.with_options(use_ninja=shutil.which("ninja") is not None)


def native() -> tuple[list[Any], dict[str, Any]]:
    """Return the extension modules to build and their command; two empty values where nothing is built."""
    if NATIVE not in NATIVE_CHOICES:
        raise SystemExit(
            f"rlsc_mcore native ops: error: RLSC_NATIVE: expected {', '.join(NATIVE_CHOICES)}, got '{NATIVE}'"
        )
    if NATIVE == "off":
        report("not built (RLSC_NATIVE=off)")
        return [], {}
    try:
        import torch
    except ImportError:
        refuse("torch is not installed in the build environment; use pip install --no-build-isolation")
        return [], {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        refuse("no C++ compiler; install one (package g++) or set CXX")
        return [], {}
    toolkit: Path | None = None
    links = None
    if NATIVE == "cpu":
        reason = "RLSC_NATIVE=cpu"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    else:
        toolkit, reason = choose_toolkit(torch.version.cuda)
    if toolkit is None:
        if NATIVE == "cuda":
            refuse(reason)
        extension = cpu_extension()
    else:
        os.environ["CUDA_HOME"] = str(toolkit)  # read by torch.utils.cpp_extension when it is imported
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
            os.environ["TORCH_CUDA_ARCH_LIST"] = {0: EVERY_ARCH}.get(major, f"{major}.{minor}")
        links = link_folder(toolkit)
        extension = cuda_extension([links.name] if links else [])
    return [extension], {"build_ext": build_command(toolkit, reason, links)}


if __name__ == "__main__":  # setuptools runs this file as a program; tests import its functions
    ext_modules, cmdclass = native()
    setup(
        packages=PACKAGES,
        ext_modules=ext_modules,
        cmdclass=cmdclass,
        options=WHEEL_TAG if ext_modules else {},
    )
