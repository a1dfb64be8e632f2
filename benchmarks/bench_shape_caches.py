"""Measure the caches of prepared kernels on a CPU: `python -m benchmarks.bench_shape_caches`.

torch (LRU_CACHE_CAPACITY) and oneDNN (ONEDNN_PRIMITIVE_CACHE_CAPACITY) keep one prepared kernel per shape of
a float32 product, and every number of tokens is a new shape. Each round trains the embedded model once per
capacity and library of the products, in a process of its own. Reported are the resident memory of the process
at the first and the last step, and the CPU time of the whole process. First checks that the capacity changes
neither losses nor gradient norms. `ratio` is the CPU time with torch's default capacity over that of a
capacity, the median of the rounds: above 1, the capacity is faster than the default.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import command_line, save  # noqa: E402
from rlsc_mcore.observability.metrics import read_metrics  # noqa: E402

DEFAULT = 1024  # of both libraries
CAPACITIES = (1, 16, 64, 256, DEFAULT)
VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
LIBRARIES = ("onednn", "blas")


def main() -> None:
    """Measure and write results/cpu/shape_caches.json."""
    options = command_line(__doc__, steps=(20, "steps of a run"), repeats=(2, "rounds"))
    sides = [(library, capacity) for library in LIBRARIES for capacity in CAPACITIES]
    rounds = [{side: train(*side, options.steps) for side in sides} for _ in range(options.repeats)]
    for library in LIBRARIES:
        losses = [found[side]["losses"] for found in rounds for side in sides if side[0] == library]
        assert all(each == losses[0] for each in losses), f"{library}: the capacity changes the losses"
    rows = [row(side, [found[side] for found in rounds], rounds) for side in sides]
    for each in rows:
        print(json.dumps(each))
    save(
        __file__,
        {"steps": options.steps, "repeats": options.repeats, "rows": rows},
        torch.device("cpu"),
        options.out,
    )


def train(library: str, capacity: int, steps: int) -> dict[str, Any]:
    """Train in a new process; returns losses and gradient norms, resident MiB per step and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlsc_mcore.cli", "train", "--config", "configs/tiny_cpu.yaml"]
        command += [
            "--run-dir",
            folder + "/run",
            "--training.num-steps",
            str(steps),
            "--data.questions-per-step",
            "16",
        ]
        command += [
            "--ops.cpu-products",
            library,
            "--rollout.cpu-products",
            library,
            "--training.save-every",
            "0",
        ]
        command += ["--evaluation.path", "None"]
        variables = os.environ | dict.fromkeys(VARIABLES, str(capacity)) | {"OMP_NUM_THREADS": "1"}
        before = cpu_seconds()
        subprocess.run(command, check=True, env=variables, stdout=subprocess.DEVNULL)
        seconds = cpu_seconds() - before
        metrics = read_metrics(Path(folder) / "run")
    assert len(metrics) == steps, f"{len(metrics)} of {steps} steps"
    return {
        "losses": [(step["loss"], step["grad_norm"]) for step in metrics],
        "resident_mib": [step["memory_bytes"]["host_resident"] / 2**20 for step in metrics],
        "cpu_seconds": seconds,
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(
    side: tuple[str, int], runs: list[dict[str, Any]], rounds: list[dict[tuple[str, int], dict[str, Any]]]
) -> dict[str, Any]:
    """Return the medians of one side over the rounds."""
    library, capacity = side
    ratios = [found[library, DEFAULT]["cpu_seconds"] / found[side]["cpu_seconds"] for found in rounds]
    return {
        "products": library,
        "capacity": capacity,
        "resident_mib_first": round(statistics.median(run["resident_mib"][0] for run in runs)),
        "resident_mib_last": round(statistics.median(run["resident_mib"][-1] for run in runs)),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 1),
        "ratio": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    main()
