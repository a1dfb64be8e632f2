"""Run a rehearsal: build the fake CUDA library once, run one rank in a separate process, return its
record."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, RunError

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
COMPILE_S = 300


def run_rank(
    flags: Sequence[str],
    folder: Path,
    *,
    rank: int,
    world_size: int,
    lengths: Sequence[int],
    steps: int = 1,
    gpu_bytes: int = 141 << 30,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Rehearse `steps` training steps of one of `world_size` ranks on sequences of `lengths` tokens.

    `flags` are those of `rlsc train`. `folder` contains the model's config.json. Returns the JSON object of
    the worker (see `rlsc_mcore.rehearsal.worker`). Raises `RunError` with the last line of stderr if the worker fails, and
    `ConfigError` if this machine cannot run a rehearsal.
    """
    library = fake_cuda_library()
    job = {
        "flags": [*flags, "--model.layers", "torch"],  # TransformerEngine's kernels reject fake tensors
        "folder": str(folder),
        "rank": rank,
        "world_size": world_size,
        "lengths": list(lengths),
        "steps": steps,
        "gpu_bytes": gpu_bytes,
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "rlsc_mcore.rehearsal.worker", str(library), str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it left no message"]
        reason = lines[-1].partition("]: ")[2] or lines[-1]
        reason = reason.removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
        raise RunError(f"rank {rank} of {world_size} fails in the rehearsal: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def fake_cuda_library() -> Path:
    """Return the compiled library of fake_cuda.cpp; build it if there is none for this torch (about 15 s).

    Raises `ConfigError` without a C++ compiler, or if torch is a CUDA build.
    """
    import torch

    if torch.version.cuda is not None:
        raise ConfigError(
            "rehearsal: it needs the CPU build of torch; this one has CUDA, so run the recipe itself"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlsc"
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = cache / f"fake_cuda_{key}.so"
    if library.is_file():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ConfigError("rehearsal: no C++ compiler was found; install g++ or set CXX")
    from torch.utils.cpp_extension import include_paths

    cache.mkdir(parents=True, exist_ok=True)
    libraries = Path(torch.__file__).parent / "lib"
    partial = cache / f"{library.name}.{os.getpid()}"
    includes = [f"-I{path}" for path in include_paths()]
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", *includes, str(SOURCE), "-o", str(partial)]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_S)
    if built.returncode:
        reason = next((line for line in built.stderr.splitlines() if "error" in line), built.stderr[-200:])
        raise ConfigError(f"rehearsal: {SOURCE.name} does not compile with {compiler}: {reason}")
    os.replace(partial, library)  # atomic, because another process may build the same library
    return library
