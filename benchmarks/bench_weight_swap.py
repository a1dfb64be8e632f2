"""Time all ways to bring new weights to the engine: `python -m benchmarks.bench_weight_swap [--shape NAME]`.

One process holds a trainer's policy (random weights) and one vLLM engine. The hot swap of this engine is
measured first: most weights share storage, the rest is rewritten. The complete transition from training to
sampling is broken down into parts. Then the engine gets its own copy of all weights, as in other trainers,
and every other way fills that copy. Before a way is timed, the engine's tensors are overwritten; afterwards
every element must equal an export of the policy. On a CPU only the ratios are meaningful.

With torchrun, `--tp T --engine-tp E` times only the hot swap between unequal layouts.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import RESULTS, Task, about, device_name, measure  # noqa: E402
from benchmarks.trainers import find_shape, write_config  # noqa: E402
from rlsc_mcore.config import Config  # noqa: E402
from rlsc_mcore.config_file import parse_config  # noqa: E402
from rlsc_mcore.model.architecture import DTYPES  # noqa: E402
from rlsc_mcore.model.build import Policy, build_policy  # noqa: E402
from rlsc_mcore.model.weight_map import export_weights  # noqa: E402
from rlsc_mcore.parallel.backend import Backend, get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import Groups, initialize_groups  # noqa: E402
from rlsc_mcore.rollout.engine import RolloutEngine, SamplingRequest  # noqa: E402
from rlsc_mcore.weight_sync.swap import HotSwap  # noqa: E402
from rlsc_mcore.weight_sync.verify import SwapMismatch  # noqa: E402

DISK = "save to disk and load"
OURS = "shared storage, the rest rewritten (ours)"
CEILING_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
FEWEST_ROUNDS = 8
PROMPT = list(range(5, 69))


def main() -> None:
    """Measure and write benchmarks/results/<device>/weight_swap_<shape>.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="embedded:tiny_qwen2", help="a public model's shape, or embedded:tiny_qwen2"
    )
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--kv-cache-gib", type=float, help="default: 8 on a GPU, 0.0625 on a CPU")
    parser.add_argument("--tp", type=int, default=1, help="trainer's tensor-parallel size (with torchrun)")
    parser.add_argument(
        "--engine-tp", type=int, help="engines' tensor-parallel size, by default the trainer's"
    )
    parser.add_argument("--seconds", type=float, help="per way (default: 3 on a GPU, 2 on a CPU)")
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results/<device>)"
    )
    options = parser.parse_args()
    backend = get_backend()
    seconds = options.seconds or (3.0 if backend.is_cuda else 2.0)
    with tempfile.TemporaryDirectory() as scratch:
        groups = initialize_groups(backend, options.tp, options.engine_tp)
        config = make_config(options, Path(scratch), backend)
        facts = {
            **about(backend.device),
            "shape": options.shape,
            "layers": options.layers,
            "dtype": config.model.dtype,
        }
        facts |= {"world_size": groups.world_size, "tp": groups.tp_size, "engine_tp": groups.engine_tp_size}
        layout = "" if groups.world_size == 1 else f"_tp{groups.tp_size}_to_{groups.engine_tp_size}"
        file = f"weight_swap_{options.shape.removeprefix('embedded:')}{layout}.json"

        def save(result: dict[str, Any]) -> None:
            if groups.is_main:
                out = options.out or RESULTS / device_name(backend.device)
                out.mkdir(parents=True, exist_ok=True)
                (out / file).write_text(
                    json.dumps({**result, "about": facts}, indent=1) + "\n", encoding="utf-8"
                )

        result = run(config, Path(scratch), backend, groups, seconds, save)
    if groups.is_main:
        print(json.dumps(result, indent=1))
    groups.barrier()
    os._exit(0)  # skip the shutdown of engine threads


def make_config(options: argparse.Namespace, scratch: Path, backend: Backend) -> Config:
    """Return the run's configuration for a model folder that holds only a config.json."""
    folder = write_config(
        find_shape(options.shape), scratch / f"model{os.environ.get('RANK', '0')}", options.layers
    )
    dtype = options.dtype or ("bfloat16" if backend.is_cuda else "float32")
    kv_cache = options.kv_cache_gib or (8.0 if backend.is_cuda else 0.0625)
    flags = [
        "--run-dir",
        str(scratch / "run"),
        "--model.path",
        str(folder),
        "--model.dtype",
        dtype,
        "--data.path",
        "embedded:train",
    ]
    flags += [
        "--rollout.kv-cache-gib",
        str(kv_cache),
        "--rollout.enforce-eager",
        "True",
        "--rollout.max-num-seqs",
        "64",
    ]
    return parse_config(
        [*flags, "--parallel.tp", str(options.tp), "--rollout.tp", str(options.engine_tp or options.tp)]
    )


def run(
    config: Config,
    scratch: Path,
    backend: Backend,
    groups: Groups,
    seconds: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Build policy and engine, then check and time every way. `save` gets the result after each new
    number."""
    policy = build_policy(config, Path(config.model.path), backend, groups, load=False)
    swap = HotSwap(policy, groups)
    dtype = DTYPES[config.model.dtype]
    engine = RolloutEngine(
        config, Path(config.model.path), backend, groups, swap.bind, max_model_len=256,
        kv_bytes_per_token=policy.architecture.kv_bytes_per_token(dtype.itemsize, groups.engine_tp_size), stop_token_ids=[],
    )  # fmt: skip
    swap.fill()
    parameters = {name: parameter.data for name, parameter in engine.module.named_parameters()}
    weight_bytes = sum(tensor.nbytes for tensor in parameters.values())
    result: dict[str, Any] = {
        "engine_weight_bytes": weight_bytes,
        "memory": {"own_bytes": swap.own_bytes(), "saved_bytes": weight_bytes - swap.own_bytes()},
        "aliased": swap.num_aliased(),
        "copied": swap.num_copied(),
    }
    gate_ours(swap)
    result["transition_ms"] = transition(engine, swap, backend, rounds=8)
    # The machine may be shared. If one process does all the work, its CPU time is more accurate than the wall
    # clock.
    alone = not backend.is_cuda and groups.world_size == 1
    result["clock"] = "CPU time of the process" if alone else "time"
    clock = time.process_time if alone else time.perf_counter
    if groups.world_size > 1:
        seconds = 0.0  # with a time limit, ranks could stop at different rounds of a collective
    checks = {"checksums": Task(swap.verify_checksums), "full": Task(swap.verify_full)}
    timings = measure(checks, backend.device, seconds / 2, FEWEST_ROUNDS, clock)
    result["verify_ms"] = {name: timing.median_ms for name, timing in timings.items()}
    moved = {OURS: sum(item.nbytes for item in own_tensors(swap))}
    source = torch.zeros(
        CEILING_BYTES[backend.device.type] // dtype.itemsize, dtype=dtype, device=backend.device
    )
    target = torch.empty_like(source)
    shared = {OURS: Task(swap._refresh), "copy": Task(lambda: target.copy_(source))}
    timings = measure(shared, backend.device, seconds, FEWEST_ROUNDS, clock)
    ours_ms = timings[OURS].median_ms
    ceiling = 2 * source.nbytes / (timings["copy"].median_ms * 1e-3)  # one read and one write
    result["copy_ceiling_bytes_per_s"] = ceiling
    result["ways"] = {OURS: _way(ours_ms, ours_ms, moved[OURS], ceiling)}
    save(result)
    if groups.world_size > 1:
        return result
    # From here on the engine has its own copy of all weights. The hot swap is timed beside each way; it takes
    # as long as before.
    for name, task in others(engine, swap, policy, scratch, backend):
        if isinstance(task, str):
            result["ways"][name] = {"skipped": task}
        else:
            slow = name == DISK  # writes and reads gigabytes: once in the check and once here
            rounds = (0.0, 1) if slow else (seconds / 2, FEWEST_ROUNDS)
            timings = measure(
                {OURS: shared[OURS], name: task}, backend.device, *rounds, clock, warm_ups=0 if slow else 2
            )
            result["ways"][name] = _way(
                timings[name].median_ms, timings[OURS].median_ms, weight_bytes, ceiling
            )
        save(result)
    return result


def _way(milliseconds: float, ours: float, size: int, ceiling: float) -> dict[str, float]:
    rate = 2 * size / (milliseconds * 1e-3)
    return {
        "ms": milliseconds,
        "bytes_written": size,
        "share_of_copy_ceiling": rate / ceiling,
        "times_ours": milliseconds / ours,
    }


def own_tensors(swap: HotSwap) -> list[torch.Tensor]:
    """Return the engine's tensors that a swap rewrites."""
    return [swap._engine_parameters[item.engine_name].data for item in swap._bound_plan().copies]


@torch.no_grad()
def gate_ours(swap: HotSwap) -> None:
    """Change the trainer's weights, overwrite the engine's own tensors, and check that after a swap every
    element equals the export."""
    for weight in swap._policy.weights:
        weight.parameter.mul_(1.0625)
    for tensor in own_tensors(swap):
        tensor.normal_()
    swap._refresh()
    swap.verify_full()
    swap.verify_checksums()


def transition(engine: RolloutEngine, swap: HotSwap, backend: Backend, rounds: int) -> dict[str, float]:
    """Return the milliseconds of each part from the end of sampling to the time at which the engine can
    sample again, without the training."""
    parts: dict[str, list[float]] = {}
    request = [SamplingRequest(PROMPT, 2, 1.0, 8, 0)]

    def clock(name: str, act: Callable[[], Any]) -> None:
        backend.synchronize()
        begin = time.perf_counter()
        act()
        backend.synchronize()
        parts.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)

    for _ in range(rounds + 2):
        engine.generate(request)
        clock("sleep", engine.sleep)
        clock("release_cached_memory", backend.release_cached_memory)
        waking = engine.waking()
        clock("wake_weights", waking.__enter__)
        clock("swap", swap._refresh)
        clock("verify_checksums", swap.verify_checksums)
        clock("wake_kv_cache", lambda waking=waking: waking.__exit__(None, None, None))
        clock("reset_prefix_cache", engine.reset_prefix_cache)
    medians = {name: statistics.median(values[2:]) for name, values in parts.items()}
    whole = [sum(values[number] for values in parts.values()) for number in range(2, rounds + 2)]
    return {**medians, "whole": statistics.median(whole)}


def others(
    engine: RolloutEngine, swap: HotSwap, policy: Policy, scratch: Path, backend: Backend
) -> Iterator[tuple[str, Task | str]]:
    """Give the engine its own copy of every tensor. Yield each way that fills the copy, or the reason why it
    is not timed."""
    module, llm = engine.module, engine._llm
    fused = {
        name: parameter.data.clone() for name, parameter in module.named_parameters()
    }  # the trainer's weights in the engine's layout
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    targets = {name: parameter.data for name, parameter in module.named_parameters()}

    def hugging_face() -> Iterator[tuple[str, torch.Tensor]]:
        return export_weights(policy.weights, policy.architecture, swap._groups.tp_group, 1)

    @torch.no_grad()
    def copy_each() -> None:
        for name, target in targets.items():
            target.copy_(fused[name], non_blocking=True)

    @torch.no_grad()
    def layerwise() -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(module)
        module.load_weights(hugging_face())  # type: ignore[operator]
        finalize_layerwise_reload(module, llm.model_config)

    @torch.no_grad()
    def through_disk() -> None:
        from safetensors.torch import load_file, save_file

        file = scratch / "model.safetensors"
        save_file({name: tensor.cpu() for name, tensor in hugging_face()}, file)
        module.load_weights(iter(load_file(file).items()))  # type: ignore[operator]

    @torch.no_grad()
    def reload(**options: Any) -> None:
        llm.collective_rpc("reload_weights", kwargs=options)

    ways: dict[str, Callable[[], Any]] = {
        "in-place copy of every tensor": copy_each,
        "torch._foreach_copy_": torch.no_grad()(
            lambda: torch._foreach_copy_(list(targets.values()), list(fused.values()))
        ),
        "load_weights, Hugging Face names": torch.no_grad()(lambda: module.load_weights(hugging_face())),  # type: ignore[operator]
        "reload_weights, engine layout": lambda: reload(
            weights_iterator=iter(fused.items()), is_checkpoint_format=False
        ),
        "reload_weights, Hugging Face names": lambda: reload(weights_iterator=hugging_face()),
        "weight-transfer API's steps, in process": layerwise,
        DISK: through_disk,
    }
    for name, way in ways.items():
        try:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.data.normal_()
            way()
            backend.synchronize()
            swap.verify_full()
        except SwapMismatch as mismatch:
            yield name, str(mismatch)
        except Exception as error:  # reported, not timed: this version lacks the call or changed it
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, Task(way)


if __name__ == "__main__":
    main()
