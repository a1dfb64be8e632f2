"""Choose the threads and the matrix products of a run on a CPU.

Threads follow from the size of the model and the cores of the process. Products are measured with the shapes
of the model: torch's BLAS against oneDNN for the trainer, and these two and packed weights for the engine.
RUN/cpu.json keeps the choice, so that a resumed run computes the same bits.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlsc_mcore.config import Config
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.parallel.cpu_products import CpuProducts, default_library, onednn_linear, use_products
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.packed_weights import multiply_packed, pack
from rlsc_mcore.run.cores import available_cores, count_sharing, threads_are_set
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.run.folder import CPU_FILE

ELEMENTS_PER_THREAD = 200_000
"""Elements of the largest weight of a layer that justify one more thread; below it one thread is faster."""

CLEARLY_FASTER, CLEARLY_FASTER_SMALL = 1.2, 1.5
"""Ratio of times from which a measurement replaces the default; the second for models whose weights have
fewer than `ELEMENTS_PER_THREAD` elements. The default is torch's BLAS, but for larger weights that of
`default_library`. A smaller difference may be noise, above all of products that take microseconds. A choice
that changes from run to run would change the results in their last bits."""

_FLOPS_PER_TRIAL = 2e8  # about 5 ms of one core
_TRIALS = 7
_SECONDS_PER_PRODUCT = 0.2  # of the trials in turns; a large product is measured fewer times


@dataclass(frozen=True)
class CpuChoice:
    """Threads and products of a run, and the measured times of one token in all layers, in microseconds."""

    threads: int
    products: CpuProducts
    processor: str
    trainer_us: dict[str, float]
    engine_us: dict[str, float]

    def describe(self) -> str:
        """Describe the choice and its measurement in one line."""

        def times(measured: dict[str, float]) -> str:
            return ", ".join(f"{name} {value:.3g}" for name, value in measured.items())

        measured = ""
        if self.trainer_us:
            measured = (
                f" (measured microseconds per token: trainer {times(self.trainer_us)}; "
                f"engine {times(self.engine_us)})"
            )
        return (
            f"cpu: threads {self.threads}, products of the trainer {self.products.trainer}, of the engine "
            f"{self.products.engine}{measured}"
        )


def tune_cpu(config: Config, architecture: Architecture, groups: Groups, *, resuming: bool) -> CpuChoice:
    """Choose threads and products, and put them into use; collective over the world.

    A run that is resumed on the same kind of processor reads its choice from RUN/cpu.json; others write it.
    The main rank reads for all. OMP_NUM_THREADS sets the number of threads if it is in the environment.
    Mutates the number of torch's threads of the process.
    """
    file = Path(config.run_dir) / CPU_FILE
    mine = _kept_choice(file, config) if resuming and groups.is_main else None
    fields = groups.gather_objects(None if mine is None else asdict(mine))[0]
    kept = None if fields is None else _choice(fields)
    largest = max(rows * columns for rows, columns in layer_products(architecture, 1))
    threads = kept.threads if kept is not None else _threads(largest, groups)
    if not threads_are_set():
        torch.set_num_threads(threads)
    choice = kept
    if choice is None:
        choice = _measured(config, architecture, groups, torch.get_num_threads())
        if groups.is_main:
            write_atomically(file, to_json(asdict(choice), indent=1) + "\n")
    use_products(choice.products)
    return choice


def read_choice(file: Path) -> CpuChoice | None:
    """Return the choice in RUN/cpu.json; None if there is none that can be read."""
    try:
        return _choice(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _choice(fields: dict[str, Any]) -> CpuChoice:
    return CpuChoice(**{**fields, "products": CpuProducts(**fields["products"])})


def _kept_choice(file: Path, config: Config) -> CpuChoice | None:
    """Return the choice of the run before, unless the processor or the configuration asks for another."""
    kept = read_choice(file)
    if (
        kept is None or kept.processor != processor_name()
    ):  # another processor computes other bits in any case
        return None
    wanted = (config.ops.cpu_products, config.rollout.cpu_products)
    used = (kept.products.trainer, kept.products.engine)
    return kept if all(want in ("auto", use) for want, use in zip(wanted, used, strict=True)) else None


def layer_products(architecture: Architecture, tp: int) -> list[tuple[int, int]]:
    """Return the shapes [N, K] of one layer's weights on one of `tp` ranks."""
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    return [
        ((queries + 2 * keys) // tp, hidden),
        (hidden, queries // tp),
        (2 * ffn // tp, hidden),
        (hidden, ffn // tp),
    ]


def threads_for(largest_weight: int, cores: int) -> int:
    """Return the threads for a model whose largest weight of a layer has this number of elements."""
    return max(1, min(cores, largest_weight // ELEMENTS_PER_THREAD))


def _threads(largest_weight: int, groups: Groups) -> int:
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    sharing = count_sharing(mine, groups.gather_objects(mine))
    return int(-groups.max(-threads_for(largest_weight, max(1, available_cores() // sharing))))


def _measured(config: Config, architecture: Architecture, groups: Groups, threads: int) -> CpuChoice:
    """Measure the products on every rank at the same time; the times of the slowest rank decide."""
    trainer_us: dict[str, float] = {}
    engine_us: dict[str, float] = {}
    trainer, engine = config.ops.cpu_products, config.rollout.cpu_products
    is_large = max(n * k for n, k in layer_products(architecture, 1)) >= ELEMENTS_PER_THREAD
    ratio = CLEARLY_FASTER if is_large else CLEARLY_FASTER_SMALL
    default = default_library() if is_large else "blas"
    products = CpuProducts("blas" if trainer == "auto" else trainer, "blas" if engine == "auto" else engine)
    if trainer == "auto" and config.model.dtype == "float32":
        shapes = layer_products(architecture, groups.tp_size)
        trainer_us = _slowest(measure_training(shapes), architecture.num_layers, groups)
        products = CpuProducts(fastest(trainer_us, default, ratio), products.engine)  # type: ignore[arg-type]
    if engine == "auto" and (config.rollout.dtype or config.model.dtype) == "float32":
        tp = groups.engine_tp_size
        shapes = layer_products(architecture, tp)
        head = (architecture.padded_vocab_size(tp) // tp, architecture.hidden_size)
        samples = config.data.questions_per_step * config.rollout.num_samples // groups.num_engines
        rows = max(1, min(config.rollout.max_num_seqs, samples))
        layers = measure_decoding(shapes, rows, packed=is_large)
        once = measure_decoding([head], rows, packed=is_large)
        whole = {name: time + once[name] / architecture.num_layers for name, time in layers.items()}
        engine_us = _slowest(whole, architecture.num_layers, groups)
        products = CpuProducts(products.trainer, fastest(engine_us, default, ratio))  # type: ignore[arg-type]
    return CpuChoice(threads, products, processor_name(), trainer_us, engine_us)


def fastest(times: dict[str, float], default: str, ratio: float) -> str:
    """Return `default`, or the fastest name of `times` if it is `ratio` times as fast."""
    best = min(times, key=times.__getitem__)
    return best if times[best] * ratio <= times[default] else default


def _slowest(times: dict[str, float], num_layers: int, groups: Groups) -> dict[str, float]:
    return {name: round(groups.max(time) * num_layers * 1e6, 3) for name, time in times.items()}


def measure_training(shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Measure output, input gradient and weight gradient of weights [N, K]: seconds per token by library."""
    seconds = {"blas": 0.0, "onednn": 0.0}
    for n, k in shapes:
        rows = _rows(n, k, 256)
        x, weight, gradient = torch.randn(rows, k), torch.randn(n, k), torch.randn(rows, n)
        for a, b in ((x, weight), (gradient, weight.t()), (gradient.t(), x.t())):
            trials: dict[str, Callable[[], Any]] = {
                "blas": partial(torch.mm, a, b.t()),
                "onednn": partial(onednn_linear, a, b),
            }
            for name, best in _best_seconds(trials).items():
                seconds[name] += best / rows
    return seconds


def measure_decoding(shapes: Sequence[tuple[int, int]], rows: int, *, packed: bool) -> dict[str, float]:
    """Measure `rows` rows times weights [N, K]: seconds per row by library, packed weights on request."""
    names = ["blas", "onednn"] + ["packed"] * packed
    seconds = dict.fromkeys(names, 0.0)
    for n, k in shapes:
        count = _rows(n, k, rows)
        x, weight = torch.randn(count, k), torch.randn(n, k)
        trials: dict[str, Callable[[], Any]] = {
            "blas": partial(torch.nn.functional.linear, x, weight),
            "onednn": partial(onednn_linear, x, weight),
        }
        if packed:
            trials["packed"] = partial(multiply_packed, pack(weight), x)
        for name, best in _best_seconds(trials).items():
            seconds[name] += best / count
    return seconds


def _rows(n: int, k: int, most: int) -> int:
    """Return the rows that take `_FLOPS_PER_TRIAL`, between 4 (at most `most`) and `most`."""
    return max(min(4, most), min(most, int(_FLOPS_PER_TRIAL / (2 * n * k))))


@torch.no_grad()
def _best_seconds(trials: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run the trials in turns and return the shortest time of each; the first turn is not counted."""
    best = dict.fromkeys(trials, float("inf"))
    begin = time.perf_counter()
    for turn in range(1 + _TRIALS):
        if turn > 1 and time.perf_counter() - begin > _SECONDS_PER_PRODUCT:
            break
        for name, run in trials.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def processor_name() -> str:
    """Return the processor's name and the widest vector instructions that torch uses."""
    name = "unknown processor"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            name = next(
                (line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), name
            )
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
