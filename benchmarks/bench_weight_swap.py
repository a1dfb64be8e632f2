"""Time all ways to bring new weights to the engine: `python -m benchmarks.bench_weight_swap [--shape NAME]`.

One process holds a trainer's policy (random weights) and one vLLM engine. The hot swap of this engine is
measured first: most weights share storage, the rest is rewritten. The complete transition from training to
sampling is broken down into parts. Then the engine gets its own copy of all weights, as in other trainers,
and every other way fills that copy. Before a way is timed, the engine's tensors are overwritten; afterwards
every element must equal an export of the policy. `ratio` is a way's time over that of the hot swap, timed in
turn; on a CPU only the ratios are meaningful.

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
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.claims import OFFICIAL, OURS  # noqa: E402
from benchmarks.harness import Task, command_line, leave, measure, process_clock, save  # noqa: E402
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
CEILING_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
FEWEST_ROUNDS = 8
PROMPT = list(range(5, 69))


def main() -> None:
    """Measure and write results/<device>/weight_swap_<shape>.json."""
    options = command_line(
        __doc__,
        shape=("embedded:tiny_qwen2", "a public model's shape, or embedded:tiny_qwen2"),
        layers=(int, "only so many layers of it"),
        dtype=(("bfloat16", "float32"), "default: bfloat16 on a GPU, float32 on a CPU"),
        kv_cache_gib=(float, "default: 8 on a GPU, 0.0625 on a CPU"),
        tp=(1, "trainer's tensor-parallel size (with torchrun)"),
        engine_tp=(int, "engines' tensor-parallel size, by default the trainer's"),
        seconds=(float, "per way (default: 3 on a GPU, 2 on a CPU)"),
    )
    backend = get_backend()
    seconds = options.seconds or (3.0 if backend.is_cuda else 2.0)
    with tempfile.TemporaryDirectory() as scratch:
        groups = initialize_groups(backend, options.tp, options.engine_tp)
        config = make_config(options, Path(scratch), backend)
        facts = {"shape": options.shape, "layers": options.layers, "dtype": config.model.dtype}
        facts |= {"world_size": groups.world_size, "tp": groups.tp_size, "engine_tp": groups.engine_tp_size}
        layout = "" if groups.world_size == 1 else f"_tp{groups.tp_size}_to_{groups.engine_tp_size}"
        variant = options.shape.removeprefix("embedded:") + layout

        def write(result: dict[str, Any]) -> None:
            if groups.is_main:
                save(__file__, result, backend.device, options.out, variant, **facts)

        result = run(config, Path(scratch), backend, groups, seconds, write)
    if groups.is_main:
        print(json.dumps(result, indent=1))
    groups.barrier()
    leave()


def make_config(options: argparse.Namespace, scratch: Path, backend: Backend) -> Config:
    """Return the run's configuration for a model folder that holds only a config.json."""
    folder = scratch / f"model{os.environ.get('RANK', '0')}"
    write_config(find_shape(options.shape), folder, options.layers)
    dtype = options.dtype or ("bfloat16" if backend.is_cuda else "float32")
    kv_cache_gib = options.kv_cache_gib or (8.0 if backend.is_cuda else 0.0625)
    flags = ["--run-dir", str(scratch / "run"), "--model.path", str(folder), "--data.path", "embedded:train"]
    flags += f"--model.dtype {dtype} --rollout.kv-cache-gib {kv_cache_gib} --rollout.max-num-seqs 64".split()
    flags += f"--rollout.enforce-eager True --parallel.tp {options.tp}".split()
    return parse_config([*flags, "--rollout.tp", str(options.engine_tp or options.tp)])


def run(
    config: Config,
    scratch: Path,
    backend: Backend,
    groups: Groups,
    seconds: float,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Build policy and engine, then check and time every way. `write` gets the result after each new
    number."""
    policy = build_policy(config, Path(config.model.path), backend, groups, load=False)
    swap = HotSwap(policy, groups)
    dtype = DTYPES[config.model.dtype]
    engine = RolloutEngine(
        config, Path(config.model.path), backend, groups, swap.bind, max_model_len=256,
        kv_bytes_per_token=policy.architecture.kv_bytes_per_token(dtype.itemsize, groups.engine_tp_size), stop_token_ids=[],
    )  # fmt: skip
    swap.fill()
    weight_bytes = sum(parameter.data.nbytes for parameter in engine.module.parameters())
    result: dict[str, Any] = {
        "engine_weight_bytes": weight_bytes,
        "memory": {"own_bytes": swap.own_bytes(), "saved_bytes": weight_bytes - swap.own_bytes()},
        "aliased": swap.num_aliased(),
        "copied": swap.num_copied(),
    }
    gate_ours(swap)
    result["transition_ms"] = transition(engine, swap, backend, rounds=8)
    clock, result["clock"] = process_clock(backend.device, groups.world_size)
    if groups.world_size > 1:
        seconds = 0.0  # with a time limit, ranks could stop at different rounds of a collective
    checks = {"checksums": Task(swap.verify_checksums), "full": Task(swap.verify_full)}
    timings = measure(checks, backend.device, seconds / 2, FEWEST_ROUNDS, clock)
    result["verify_ms"] = {name: timing.median_ms for name, timing in timings.items()}
    numel = CEILING_BYTES[backend.device.type] // dtype.itemsize
    source = torch.zeros(numel, dtype=dtype, device=backend.device)
    target = torch.empty_like(source)
    shared = {OURS: Task(swap._refresh), "copy": Task(lambda: target.copy_(source))}
    timings = measure(shared, backend.device, seconds, FEWEST_ROUNDS, clock)
    ours_ms = timings[OURS].median_ms
    ceiling = 2 * source.nbytes / (timings["copy"].median_ms * 1e-3)  # one read and one write
    result["copy_ceiling_bytes_per_s"] = ceiling
    result["ways"] = {OURS: _way(ours_ms, ours_ms, sum(item.nbytes for item in own_tensors(swap)), ceiling)}
    write(result)
    if groups.world_size > 1:
        return result
    # From here on the engine has its own copy of all weights. The hot swap is timed beside each way; it takes
    # as long as before.
    torch.set_grad_enabled(False)
    for name, task in others(engine, swap, policy, scratch, backend):
        if isinstance(task, str):
            result["ways"][name] = {"skipped": task}
        else:
            # Through the disk, gigabytes are written and read: once in the check and once here.
            rounds = (0.0, 1, clock, 0) if name == DISK else (seconds / 2, FEWEST_ROUNDS, clock)
            timings = measure({OURS: shared[OURS], name: task}, backend.device, *rounds)
            way_ms, ours_ms = timings[name].median_ms, timings[OURS].median_ms
            result["ways"][name] = _way(way_ms, ours_ms, weight_bytes, ceiling)
        write(result)
    return result


def _way(milliseconds: float, ours: float, size: int, ceiling: float) -> dict[str, float]:
    rate = 2 * size / (milliseconds * 1e-3)
    return {
        "ms": milliseconds,
        "bytes_written": size,
        "share_of_copy_ceiling": rate / ceiling,
        "ratio": milliseconds / ours,
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
    # The trainer's weights in the engine's layout.
    fused = {name: parameter.data.clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    targets = {name: parameter.data for name, parameter in module.named_parameters()}

    def hugging_face() -> Iterator[tuple[str, torch.Tensor]]:
        return export_weights(policy.weights, policy.architecture, swap._groups.tp_group, 1)

    def copy_each() -> None:
        for name, target in targets.items():
            target.copy_(fused[name], non_blocking=True)

    def layerwise() -> None:
        from vllm.model_executor.model_loader import reload

        reload.initialize_layerwise_reload(module)
        module.load_weights(hugging_face())
        reload.finalize_layerwise_reload(module, llm.model_config)

    def through_disk() -> None:
        file = scratch / "model.safetensors"
        save_file({name: tensor.cpu() for name, tensor in hugging_face()}, file)
        module.load_weights(iter(load_file(file).items()))

    def reload_weights(**options: Any) -> None:
        llm.collective_rpc("reload_weights", kwargs=options)

    ways: dict[str, Callable[[], Any]] = {
        "in-place copy of every tensor": copy_each,
        "torch._foreach_copy_": lambda: torch._foreach_copy_([*targets.values()], [*fused.values()]),
        "load_weights, Hugging Face names": lambda: module.load_weights(hugging_face()),
        "reload_weights, engine layout": lambda: reload_weights(
            weights_iterator=iter(fused.items()), is_checkpoint_format=False
        ),
        OFFICIAL: lambda: reload_weights(weights_iterator=hugging_face()),
        "weight-transfer API's steps, in process": layerwise,
        DISK: through_disk,
    }
    for name, way in ways.items():
        try:
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
