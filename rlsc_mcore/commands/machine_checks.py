"""Check the machine for `rlsc doctor`: devices, compilers, limits, disk and environment variables."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rlsc_mcore.commands.findings import Finding, device_type, import_quietly
from rlsc_mcore.run.cores import available_cores, threads_are_set

SHARED_MEMORY = Path("/dev/shm")
SMALLEST_SHARED_MEMORY = 512 << 20  # bytes of /dev/shm; a container has 64 MiB by default
FEWEST_OPEN_FILES = 1024
SMALLEST_FREE_DISK = 5 << 30  # bytes


def check_devices() -> Iterator[Finding]:
    """Report the GPUs that NVML lists; without one, the processor."""
    nvml, _ = import_quietly("pynvml")
    gpus = []
    if nvml is not None:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                name = _text(nvml.nvmlDeviceGetName(handle))
                gpus.append(
                    f"GPU {index}: {name}, {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, "
                    f"driver {driver}"
                )
            nvml.nvmlShutdown()
    for gpu in gpus:
        yield Finding("ok", "device", gpu)
    if not gpus:
        yield Finding(
            "ok",
            "device",
            f"CPU, {available_cores()} cores usable, {_memory_gib():.1f} GiB memory; no NVIDIA GPU",
        )


def check_compiler() -> Iterator[Finding]:
    """Check for the compilers and the Python headers that the native ops are built with."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if compiler is None:
        fix = "as root: apt-get install g++ (Fedora: dnf install gcc-c++)"
        yield Finding("note", "compiler", "no C++ compiler: the native ops cannot be built", fix)
    elif not headers.exists():
        fix = "as root: apt-get install python3-dev (Fedora: dnf install python3-devel)"
        yield Finding(
            "note", "compiler", f"{compiler}, but {headers} is missing: the native ops cannot be built", fix
        )
    else:
        yield Finding("ok", "compiler", compiler)
    if device_type() == "cuda":
        nvcc = find_nvcc()
        yield Finding(
            "ok",
            "nvcc",
            f"{nvcc}, CUDA {nvcc_version(nvcc)}" if nvcc else "not found; needed to build the CUDA ops only",
        )


def find_nvcc() -> str | None:
    """Return the path of nvcc or None; looks in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and the package
    nvidia-cuda-nvcc."""
    folders = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    candidates = [Path(folder, "bin", "nvcc") for folder in folders if folder]
    candidates += [Path(found) for found in (shutil.which("nvcc"),) if found]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))
    return next((str(candidate) for candidate in candidates if candidate.exists()), None)


def nvcc_version(nvcc: str) -> str:
    """Return the release that nvcc prints, or "unknown" if nvcc fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60)
        release = re.search(r"release (\d+\.\d+)", done.stdout)
        if release:
            return release.group(1)
    return "unknown"


def check_shared_memory() -> Iterator[Finding]:
    """Check the space of /dev/shm, through which the ranks of a machine exchange activations."""
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        text = f"{SHARED_MEMORY} is missing: ranks of one machine cannot share memory"
        yield Finding("warn", "shared memory", text, f"mount -t tmpfs tmpfs {SHARED_MEMORY}")
        return
    text = f"{SHARED_MEMORY}: {free / 2**20:.0f} of {total / 2**20:.0f} MiB free"
    if free < SMALLEST_SHARED_MEMORY:
        text += f"; runs with several ranks on one machine need {SMALLEST_SHARED_MEMORY >> 20} MiB"
        yield Finding(
            "warn",
            "shared memory",
            text,
            "remove old files there; start a container with --shm-size=2g or --ipc=host",
        )
    else:
        yield Finding("ok", "shared memory", text)


def check_open_files() -> Iterator[Finding]:
    """Check the limit of open files: every rank, checkpoint file and connection needs file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEWEST_OPEN_FILES:
        text = f"a process may open {soft} files; engine and checkpoints need {FEWEST_OPEN_FILES}"
        allowed = hard == resource.RLIM_INFINITY or hard >= FEWEST_OPEN_FILES
        fix = (
            f"ulimit -n {FEWEST_OPEN_FILES}"
            if allowed
            else "raise the hard limit (nofile in /etc/security/limits.conf)"
        )
        yield Finding("warn", "open files", text, fix)
    else:
        yield Finding(
            "ok", "open files", f"{'no limit' if soft == resource.RLIM_INFINITY else soft} per process"
        )


def check_disk() -> Iterator[Finding]:
    """Check the free space of the working folder, the hub cache and the vLLM cache (compiled kernels)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folders = {
        "working folder": Path.cwd(),
        "hub cache": Path(os.environ.get("HF_HOME", home / "huggingface")),
        "vLLM cache": Path(os.environ.get("VLLM_CACHE_ROOT", home / "vllm")),
    }
    for name, folder in folders.items():
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        text = f"{name} {folder}: {free / 2**30:.1f} GiB free"
        if free < SMALLEST_FREE_DISK:
            yield Finding(
                "warn",
                "disk",
                text,
                "make room, or choose another place (--run-dir, HF_HOME, VLLM_CACHE_ROOT)",
            )
        elif not os.access(existing, os.W_OK):
            yield Finding(
                "warn",
                "disk",
                f"{name} {folder} cannot be written",
                "choose another place (--run-dir, HF_HOME, VLLM_CACHE_ROOT)",
            )
        else:
            yield Finding("ok", "disk", text)


def check_allocator() -> Iterator[Finding]:
    """Check the settings of the CUDA allocator: the engine cannot sleep with expandable segments."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = os.environ.get(variable, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            text = f"{variable}={value}: the engine cannot sleep with expandable segments"
            yield Finding("error", "allocator", text, f"unset {variable}")


def check_threads() -> Iterator[Finding]:
    """Check the number of OpenMP threads on a CPU."""
    if device_type() == "cuda":
        return
    cores = available_cores()
    if not threads_are_set():
        yield Finding("ok", "threads", f"by the size of the model, at most {cores} (the usable cores)")
        return
    threads = os.environ["OMP_NUM_THREADS"]
    if threads.isdecimal() and 1 <= int(threads) <= cores:
        yield Finding("ok", "threads", f"OMP_NUM_THREADS={threads}, usable cores: {cores}")
    else:
        yield Finding(
            "warn",
            "threads",
            f"OMP_NUM_THREADS={threads}, but {cores} cores are usable: threads would wait for each other",
            "unset OMP_NUM_THREADS",
        )


def has_nvidia_driver() -> bool:
    """Return whether the NVIDIA driver is present, independently of torch."""
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return (
        tool is not None
        and subprocess.run([tool, "-L"], capture_output=True, check=False, timeout=20).returncode == 0
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
