"""Measure the time of saving and loading a checkpoint: `python -m benchmarks.bench_checkpoint [--model
NAME|FOLDER]`.

First checks that the loaded state equals the saved one. Then saves and loads a trainer's complete state and
compares the time with writing (with fsync) and reading a file of the same size on the same disk. Reports
seconds per GiB of each and the ratios; on a CPU only the ratios are meaningful. Also times how long an
asynchronous save blocks the training.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import RESULTS, about, device_name  # noqa: E402
from benchmarks.trainers import find_shape, make_trainer, write_config  # noqa: E402
from rlsc_mcore.parallel.backend import get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import initialize_groups  # noqa: E402
from rlsc_mcore.training.checkpoint import CheckpointSaver, load_checkpoint  # noqa: E402
from rlsc_mcore.training.step import Trainer  # noqa: E402

CHUNK = 16 << 20


def main() -> None:
    """Measure and write benchmarks/results/<device>/bench_checkpoint.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a public model's shape (random weights)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: the system's)")
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results/<device>)"
    )
    options = parser.parse_args()
    backend = get_backend()
    groups = initialize_groups(backend, 1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        model = write_config(find_shape(options.model), folder / "model", options.layers)
        trainer = make_trainer(model, ["--model.dtype", options.dtype], backend, groups)
        result = measure(trainer, folder, options.repeats)
        gib = result["gib"]
        result["about"] = {
            **about(backend.device),
            "model": options.model,
            "layers": options.layers,
            "dtype": options.dtype,
        }
        print(json.dumps(result, indent=1))
        out = options.out or RESULTS / device_name(backend.device)
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench_checkpoint.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        assert gib > 0
    os._exit(0)


def measure(trainer: Trainer, folder: Path, repeats: int) -> dict[str, Any]:
    """Time saves, loads and raw copies in turn."""
    times: dict[str, list[float]] = {"save": [], "save_beside": [], "write": [], "load": [], "read": []}
    size = 0
    for turn in range(repeats + 1):  # the first turn warms up
        run = folder / f"run{turn}"
        saver = CheckpointSaver(run, trainer, "questions", keep_last=1)
        save = clock(lambda saver=saver: saver.save(1, 1))
        checkpoint = run / "checkpoints" / "step_000001"
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        before = {weight.name: weight.parameter.detach().clone() for weight in trainer.policy.weights}
        with torch.no_grad():
            for weight in trainer.policy.weights:
                weight.parameter.zero_()
        load = clock(lambda checkpoint=checkpoint: load_checkpoint(checkpoint, trainer))
        assert all(torch.equal(weight.parameter, before[weight.name]) for weight in trainer.policy.weights), (
            "the state has changed"
        )
        beside = CheckpointSaver(
            folder / f"beside{turn}", trainer, "questions", keep_last=1, asynchronous=True
        )
        blocked = clock(lambda beside=beside: beside.save(1, 1))
        beside.finish()
        raw = folder / "raw"
        write, read = (
            clock(lambda raw=raw, size=size: write_raw(raw, size)),
            clock(lambda raw=raw: read_raw(raw)),
        )
        if turn:
            for name, value in (
                ("save", save),
                ("save_beside", blocked),
                ("write", write),
                ("load", load),
                ("read", read),
            ):
                times[name].append(value)
        for path in (run, folder / f"beside{turn}"):
            shutil.rmtree(path)
    median = {name: statistics.median(values) for name, values in times.items()}
    gib = size / 2**30
    return {
        "gib": round(gib, 3),
        "seconds_per_gib": {name: round(value / gib, 3) for name, value in median.items()},
        "save_over_raw_write": round(median["save"] / median["write"], 2),
        "load_over_raw_read": round(median["load"] / median["read"], 2),
        "blocked_share_of_save_beside_training": round(median["save_beside"] / median["save"], 3),
        "repeats": repeats,
    }


def clock(act: Callable[[], Any]) -> float:
    """Return the duration of a call in seconds."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def write_raw(file: Path, size: int) -> None:
    """Write `size` random bytes and call fsync."""
    block = os.urandom(1 << 20) * (CHUNK >> 20)
    with file.open("wb") as out:
        for start in range(0, size, CHUNK):
            out.write(block[: min(CHUNK, size - start)])
        out.flush()
        os.fsync(out.fileno())


def read_raw(file: Path) -> None:
    """Read a file to its end."""
    with file.open("rb") as content:
        while content.read(CHUNK):
            pass


if __name__ == "__main__":
    main()
