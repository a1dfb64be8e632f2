"""Measure the time of saving and loading a checkpoint: `python -m benchmarks.bench_checkpoint [--model
NAME|FOLDER]`.

First checks that the loaded state equals the saved one. Then saves and loads a trainer's complete state, in
turn with writing (with fsync) and reading a file of the same size on the same disk. Also times how long an
asynchronous save blocks the training. Reports seconds per GiB of each; on a CPU only `ratio` is meaningful: a
save over a raw write, a load over a raw read, and the blocked time of an asynchronous save over a save.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import Task, command_line, leave, save, take_turns  # noqa: E402
from benchmarks.trainers import find_shape, make_trainer, write_config  # noqa: E402
from rlsc_mcore.parallel.backend import get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import initialize_groups  # noqa: E402
from rlsc_mcore.training.checkpoint import CheckpointSaver, load_checkpoint  # noqa: E402
from rlsc_mcore.training.step import Trainer  # noqa: E402

CHUNK = 16 << 20


def main() -> None:
    """Measure and write results/<device>/checkpoint.json."""
    options = command_line(
        __doc__,
        model=("smollm2-135m", "a public model's shape (random weights)"),
        dtype=(("bfloat16", "float32"), "default: bfloat16"),
        layers=(int, "only so many layers of it"),
        repeats=(3, "rounds"),
        scratch=(Path, "folder on the disk to measure (default: the system's)"),
    )
    dtype = options.dtype or "bfloat16"
    backend = get_backend()
    groups = initialize_groups(backend, 1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        model = write_config(find_shape(options.model), folder / "model", options.layers)
        trainer = make_trainer(model, ["--model.dtype", dtype], backend, groups)
        result = measure(trainer, folder, options.repeats)
    print(json.dumps(result, indent=1))
    facts = {"model": options.model, "layers": options.layers, "dtype": dtype}
    save(__file__, result, backend.device, options.out, **facts)
    leave()


def measure(trainer: Trainer, folder: Path, repeats: int) -> dict[str, Any]:
    """Check a loaded state, then time saves, loads and raw copies in turn; the first round warms up."""
    raw = folder / "raw"
    checkpoint = folder / "run" / "checkpoints" / "step_000001"
    savers: dict[str, CheckpointSaver] = {}

    def renew(name: str) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        asynchronous = name == "beside"
        savers[name] = CheckpointSaver(
            folder / name, trainer, "questions", keep_last=1, asynchronous=asynchronous
        )

    def finish_beside() -> None:
        savers["beside"].finish()

    def check() -> None:
        before = [weight.parameter.detach().clone() for weight in trainer.policy.weights]
        with torch.no_grad():
            for weight in trainer.policy.weights:
                weight.parameter.zero_()
        load_checkpoint(checkpoint, trainer)
        for weight, saved in zip(trainer.policy.weights, before, strict=True):
            assert torch.equal(weight.parameter, saved), f"{weight.name} differs from its saved values"

    renew("run")
    savers["run"].save(1, 1)
    check()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    tasks = {
        "save": Task(lambda: savers["run"].save(1, 1), lambda: renew("run")),
        "load": Task(lambda: load_checkpoint(checkpoint, trainer)),
        "save_beside": Task(lambda: savers["beside"].save(1, 1), lambda: renew("beside")),
        "write": Task(lambda: write_raw(raw, size), finish_beside),
        "read": Task(lambda: read_raw(raw)),
    }
    times = take_turns(tasks, trainer.backend.device, 0.0, repeats + 1, time.perf_counter)
    seconds = {name: statistics.median(values[1:]) / 1e3 for name, values in times.items()}
    gib = size / 2**30
    return {
        "gib": round(gib, 3),
        "seconds_per_gib": {name: round(value / gib, 3) for name, value in seconds.items()},
        "ratio": {
            "save_and_raw_write": round(seconds["save"] / seconds["write"], 2),
            "load_and_raw_read": round(seconds["load"] / seconds["read"], 2),
            "blocked_by_asynchronous_save": round(seconds["save_beside"] / seconds["save"], 3),
        },
        "repeats": repeats,
    }


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
