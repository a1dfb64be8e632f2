"""Measure a training step: `python -m benchmarks.bench_train_step [--shape NAME] [--section.field VALUE
...]`.

Runs `Trainer.step` (forward, weighted loss, backward, clipping, AdamW) on packed sequences, with the layers
of a run and without an engine. Reports tokens/s, the share of attention, MLP, head, optimizer and
collectives, peak memory, and model FLOPs utilisation: FLOPs of the model (causal attention, head on trained
tokens, no recomputation) over the GPU's published bf16 rate. Every field of `rlsc train` can be set, for
example `--training.recompute full` or `--optimizer.cpu-offload 0.5`.

Correctness is checked first: loss and gradient norm of two steps must equal those of plain `transformers`
with `torch.optim.AdamW`. On a CPU that side is timed too, in turn on the same sequences (padded by length,
full logits). `ratio` is this program's tokens/s over that side's, and its peak memory over that side's; quote
only the ratios.

    python -m benchmarks.bench_train_step                               # the embedded model, a CPU
    python -m benchmarks.bench_train_step --shape qwen2.5-1.5b          # random weights; one H200: goal 45 %
    python -m benchmarks.bench_train_step --shape qwen2.5-7b            # goal 50 %
    torchrun --nproc-per-node 2 -m benchmarks.bench_train_step --shape qwen2.5-7b --parallel.tp 2
"""

import argparse
import gc
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import (  # noqa: E402
    Task,
    command_line,
    device_name,
    in_process,
    leave,
    measure,
    measure_ceilings,
    process_clock,
    refuse,
    save,
)
from benchmarks.plain_transformers import accumulate, load_model, num_tokens, pad_by_length  # noqa: E402
from benchmarks.shapes import GOALS  # noqa: E402
from benchmarks.step_parts import seconds_in_collectives, timed_parts  # noqa: E402
from benchmarks.trainers import find_shape, make_trainer, write_config  # noqa: E402
from rlsc_mcore.data.packing import pack  # noqa: E402
from rlsc_mcore.model.architecture import DTYPES  # noqa: E402
from rlsc_mcore.model.shape import Architecture  # noqa: E402
from rlsc_mcore.model.weight_map import export_weights  # noqa: E402
from rlsc_mcore.parallel.backend import Backend, get_backend  # noqa: E402
from rlsc_mcore.parallel.cpu_products import cpu_linear  # noqa: E402
from rlsc_mcore.parallel.groups import Groups, initialize_groups  # noqa: E402
from rlsc_mcore.parallel.packages import has_transformer_engine  # noqa: E402
from rlsc_mcore.planning.known_models import num_parameters  # noqa: E402
from rlsc_mcore.planning.timing import GPUS  # noqa: E402
from rlsc_mcore.training.step import Trainer  # noqa: E402
from rlsc_mcore.types import Rollout, UniqueSequence  # noqa: E402

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 5e-2)}  # relative, of loss and gradient norm
# Layers and sequences of the checked model on a GPU, because two whole models would not fit.
GATE_LAYERS, GATE_SEQUENCES = 2, 4
# Freed memory returns to the system at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    """Measure one shape and write results/<device>/train_step_<shape>.json."""
    options = command_line(
        __doc__,
        flags=True,
        shape=("embedded:tiny_qwen2", "a public model's name, a model folder or embedded:tiny_qwen2"),
        layers=(int, "only so many layers of it"),
        sequences=(int, "sequences of a step, over all ranks (default: 40 on a GPU, 128 on a CPU)"),
        sequence_length=(int, "tokens of a sequence with its prompt (default: 3072 on a GPU, 96 on a CPU)"),
        prompt_tokens=(32, "of them the prompt, which is not trained"),
        ragged=(False, "lengths between the prompt and --sequence-length instead of all equal"),
        repeats=(5, "timed steps of each side, after two that are not"),
    )
    backend = get_backend()
    options.sequences = options.sequences or (40 if backend.is_cuda else 128)
    options.sequence_length = options.sequence_length or (3072 if backend.is_cuda else 96)
    if not 0 < options.prompt_tokens < (length := options.sequence_length):
        refuse(
            f"--prompt-tokens: expected fewer than --sequence-length {length}, got {options.prompt_tokens}"
        )
    flags = [*default_flags(find_shape(options.shape), backend), *options.flags]
    groups = initialize_groups(backend, int(flag_value(flags, "--parallel.tp", "1")))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, flags, backend, groups, Path(scratch))
        result, facts = bench.run()
    if groups.is_main:
        print(json.dumps(result, indent=1))
        print(describe({**result, "about": facts}))
        spread = f"_tp{groups.tp_size}_dp{groups.dp_size}" if groups.world_size > 1 else ""
        save(__file__, result, backend.device, options.out, short_name(options.shape) + spread, **facts)
    groups.barrier()
    leave()


def short_name(shape: str) -> str:
    """Return a shape's name without owner or kind: qwen2.5-7b, tiny_qwen2."""
    return shape.rpartition("/")[2].rpartition(":")[2].lower()


def default_flags(shape: Architecture, backend: Backend) -> list[str]:
    """Return settings with which a model of up to 7 B parameters fits one H200; on a CPU float32."""
    if not backend.is_cuda:
        return ["--model.dtype", "float32"]
    if num_parameters(shape) < 4e9:
        return ["--model.dtype", "bfloat16", "--training.tokens-per-micro-batch", "15360"]
    # 7.6 B parameters: weights 14 GiB, gradients 28, masters 28, moments 28 in bfloat16 (57 in float32, which
    # does not fit), and 22 of activations per 3072 tokens. Without TransformerEngine's Adam half of the
    # optimizer state is offloaded to the host.
    memory = "--optimizer.precision-aware True" if has_transformer_engine() else "--optimizer.cpu-offload 0.5"
    return f"--model.dtype bfloat16 --training.tokens-per-micro-batch 3072 {memory}".split()


def flag_value(flags: Sequence[str], name: str, default: str) -> str:
    """Return the last value of a flag, as `--name value` or `--name=value`."""
    found = default
    for position, flag in enumerate(flags):
        if flag == name and position + 1 < len(flags):
            found = flags[position + 1]
        elif flag.startswith(name + "="):
            found = flag.partition("=")[2]
    return found


class Bench:
    """One shape, one set of flags, one step's sequences."""

    def __init__(
        self,
        options: argparse.Namespace,
        flags: Sequence[str],
        backend: Backend,
        groups: Groups,
        scratch: Path,
    ) -> None:
        self.options, self.flags, self.backend, self.groups = options, list(flags), backend, groups
        self.shape = find_shape(options.shape)
        self.folder = write_config(self.shape, scratch / "model", options.layers)
        self.gate_folder = self.folder
        if backend.is_cuda:
            self.gate_folder = write_config(self.shape, scratch / "gate", GATE_LAYERS)
        self.sequences = make_sequences(options, self.shape.vocab_size)

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check, then measure everything. Return the result and what was measured; collective over the
        world."""
        dtype = DTYPES[flag_value(self.flags, "--model.dtype", "bfloat16")]
        gemm = measured_gemm_flops_per_s(self.backend, dtype)
        correct = self.check()
        gc.collect()  # the checked trainer and model
        self.backend.release_cached_memory()
        trainer = make_trainer(self.folder, self.flags, self.backend, self.groups)
        ours = self.our_step(trainer)
        tasks = {"rlsc_mcore": Task(ours)}
        if self.backend.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            tasks["transformers"] = Task(self.their_step(trainer, self.folder, self.sequences))
        clock, clock_name = process_clock(self.backend.device, self.groups.world_size)
        # Every rank runs the same number of rounds.
        timings = measure(tasks, self.backend.device, 0.0, self.options.repeats, clock)
        device_memory = self.backend.memory_bytes()
        seconds = timings["rlsc_mcore"].median_ms / 1e3
        theirs, step = timings.get("transformers"), self.sizes(trainer)
        result = {
            "correct": correct,
            "step": step,
            "clock": clock_name,
            "timing_ms": {name: asdict(timing) for name, timing in timings.items()},
            "tokens_per_s": round(step["tokens"] / seconds, 1),
            "ratio": None if theirs is None else round(theirs.median_ms / 1e3 / seconds, 3),
            "utilisation": self.utilisation(step["model_flops"] / seconds / self.groups.world_size, gemm),
            "share": self.shares(trainer, ours, seconds),
            "memory": self.memory(device_memory),
        }
        return result, self.facts(trainer)

    def our_step(self, trainer: Trainer) -> Callable[[], Any]:
        """Run one step of this engine's trainer on this rank's share of the sequences."""
        batches = self.batches(trainer, self.sequences)
        return lambda: trainer.step(batches, 0, len(self.sequences))

    def batches(self, trainer: Trainer, sequences: Sequence[UniqueSequence]) -> list[Any]:
        """Return the packed micro-batches of this data-parallel rank."""
        mine = sequences[self.groups.dp_rank :: self.groups.dp_size]
        return pack(mine, trainer.config.training.tokens_per_micro_batch, multiple_of=trainer.token_multiple)

    def their_step(
        self, trainer: Trainer, folder: Path, sequences: Sequence[UniqueSequence]
    ) -> Callable[[], tuple[float, float]]:
        """Run the same step with the same weights in plain `transformers`. Return loss and gradient norm."""
        config, policy, tp = trainer.config, trainer.policy, self.groups.tp_size
        tensors = export_weights(policy.weights, policy.architecture, self.groups.tp_group, tp)
        model = load_model(folder, tensors, DTYPES[config.model.dtype], self.backend.device)
        padded = pad_by_length(sequences, config.training.tokens_per_micro_batch)
        options, alpha, temperature = config.optimizer, config.algorithm.alpha, trainer.log_prob_temperature
        matrices = {
            "params": [p for p in model.parameters() if p.dim() > 1],
            "weight_decay": options.weight_decay,
        }
        vectors = {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}
        betas = options.beta1, options.beta2
        optimizer = torch.optim.AdamW(
            [matrices, vectors], lr=options.lr, betas=betas, eps=options.eps, fused=True
        )

        def step() -> tuple[float, float]:
            weigh = lambda log_probs, _: (log_probs.exp() + alpha) / len(sequences)  # noqa: E731
            loss = accumulate(model, padded, weigh, temperature)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad or float("inf"))
            optimizer.step()
            return loss, float(norm)

        return step

    def check(self) -> dict[str, Any]:
        """Compare loss and gradient norm of two steps with `transformers`; raises AssertionError where they
        differ."""
        trainer = make_trainer(self.gate_folder, self.flags, self.backend, self.groups)
        sequences = self.sequences
        if self.backend.is_cuda:
            sequences = sequences[: max(GATE_SEQUENCES, self.groups.dp_size)]
        batches = self.batches(trainer, sequences)
        theirs = self.their_step(trainer, self.gate_folder, sequences)
        found: dict[str, list[list[float]]] = {"loss": [], "grad_norm": []}
        tolerances = TOLERANCES[trainer.config.model.dtype]
        for step in range(2):  # the second step uses the first step's update
            outcome = trainer.step(batches, 0, len(sequences))
            pairs = zip((outcome.loss, outcome.grad_norm), theirs(), strict=True)
            for (name, values), pair, tolerance in zip(found.items(), pairs, tolerances, strict=True):
                values.append(list(pair))
                assert abs(pair[0] - pair[1]) <= tolerance * abs(pair[1]), (
                    f"step {step + 1}: {name} {pair[0]}, transformers {pair[1]}"
                )
        return {
            **{f"{name}_and_transformers": values for name, values in found.items()},
            "layers": trainer.policy.megatron_config.num_layers,
            "sequences": len(sequences),
        }

    def sizes(self, trainer: Trainer) -> dict[str, Any]:
        """Count the tokens and FLOPs of a step over all ranks."""
        cost = trainer.policy.architecture.cost_model()
        lengths = [num_tokens(sequence) for sequence in self.sequences]
        trained = [sum(sequence.trained) for sequence in self.sequences]
        weights, tp = trainer.policy.weights, self.groups.tp_size
        return {
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "trained_tokens": sum(trained),
            "micro_batches_of_a_rank": len(self.batches(trainer, self.sequences)),
            "model_flops": sum(map(cost.flops, lengths, trained)),
            "parameters": sum(w.parameter.numel() * (1 if w.tp_dim is None else tp) for w in weights),
        }

    def utilisation(self, flops_per_s: float, gemm: float) -> dict[str, Any]:
        """Return the model FLOPs per second of a rank over the published and the measured rate of a matrix
        product."""
        found: dict[str, Any] = {
            "model_tflops_per_s": round(flops_per_s / 1e12, 4),
            "share_of_measured_gemm": round(flops_per_s / gemm, 4),
        }
        if not self.backend.is_cuda:
            return {**found, "measured_gemm_tflops_per_s": round(gemm / 1e12, 4)}
        gpu = GPUS.get(device_name(self.backend.device))
        mfu = None if gpu is None else round(flops_per_s / (gpu.bf16_tflops * 1e12), 4)
        goal = GOALS.get(short_name(self.options.shape)) if self.options.layers is None else None
        return {**found, "mfu": mfu, "peak_tflops_per_s": gpu and gpu.bf16_tflops, "goal_on_one_h200": goal}

    def shares(self, trainer: Trainer, step: Callable[[], Any], seconds: float) -> dict[str, float]:
        """Time the parts of a few more steps; the time of collectives is included in the other parts."""
        with timed_parts(trainer) as parts:
            for _ in range(max(2, self.options.repeats // 2)):
                parts.begin("whole")
                step()
                parts.end("whole")
            found = parts.seconds()
        share = {part: found[part] / found["whole"] for part in ("attention", "mlp", "head", "optimizer")}
        share["rest"] = 1.0 - sum(share.values())
        alone = self.groups.world_size == 1
        share["of it in collectives"] = 0.0 if alone else seconds_in_collectives(self.backend, step) / seconds
        return {part: round(value, 4) for part, value in share.items()}

    def memory(self, device_memory: dict[str, int]) -> dict[str, Any]:
        """Return the peak memory of a step: of torch's allocator on a GPU; on a CPU the growth of a process
        that runs only one side."""
        if self.backend.is_cuda:
            return {name: device_memory[name] for name in ("device_peak", "device_reserved")}
        if self.groups.world_size > 1:
            return {}
        sides = ("rlsc_mcore", "transformers")
        child = partial(in_process, peak_host_bytes, self.options, self.flags, environment=MALLOC)
        peaks = {side: child(side) for side in sides}
        return {"peak_bytes": peaks, "ratio": round(peaks["rlsc_mcore"] / peaks["transformers"], 3)}

    def facts(self, trainer: Trainer) -> dict[str, Any]:
        """Return what was measured."""
        config = trainer.config
        return {
            "shape": self.options.shape,
            "layers": trainer.policy.megatron_config.num_layers,
            "layer_implementation": ("torch SDPA", "TransformerEngine")[trainer.policy.transformer_engine],
            "adam": self.backend.adam_source(),
            "dtype": config.model.dtype,
            "recompute": config.training.recompute,
            "precision_aware": config.optimizer.precision_aware,
            "cpu_offload": config.optimizer.cpu_offload,
            "tokens_per_micro_batch": config.training.tokens_per_micro_batch,
            "sequence_length": self.options.sequence_length,
            "prompt_tokens": self.options.prompt_tokens,
            "ragged": self.options.ragged,
            "tp": self.groups.tp_size,
            "dp": self.groups.dp_size,
        }


def make_sequences(options: argparse.Namespace, vocab_size: int) -> list[UniqueSequence]:
    """Return a step's sequences of random tokens, all different; the same on every rank."""
    stream = random.Random(0)
    sequences = []
    for index in range(options.sequences):
        longest = options.sequence_length - options.prompt_tokens
        count = stream.randint(1, longest) if options.ragged else longest
        prompt = tuple(stream.randrange(1, vocab_size) for _ in range(options.prompt_tokens))
        response = tuple(stream.randrange(1, vocab_size) for _ in range(count))
        rollout = Rollout(index, 0, prompt, response, (-1.0,) * count, "stop", 0)
        sequences.append(UniqueSequence(rollout, index, 1, (True,) * count))
    return sequences


def measured_gemm_flops_per_s(backend: Backend, dtype: torch.dtype) -> float:
    """Measure the rate of a matrix product; on a CPU with the product that the trainer uses."""
    if backend.is_cuda:
        best = measure_ceilings(backend.device, dtype).matmul_flops_per_s
        torch.cuda.empty_cache()
        return best
    a, b = (torch.randn(768, 768, dtype=dtype) for _ in range(2))
    tasks = {"product": Task(lambda: cpu_linear(a, b))}
    timing = measure(tasks, backend.device, 0.0, fewest=100, clock=process_clock(backend.device)[0])[
        "product"
    ]
    return 2.0 * 768**3 / (timing.median_ms * 1e-3)


def peak_host_bytes(options: argparse.Namespace, flags: Sequence[str], side: str) -> int:
    """Build one side in this process, run two steps and return the peak of the second minus the memory before
    the first."""
    import transformers  # noqa: F401  # import it before the measurement, for both sides

    backend = get_backend()
    groups = initialize_groups(backend, 1)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, flags, backend, groups, Path(scratch))
        before = resident("VmRSS")
        trainer = make_trainer(bench.folder, bench.flags, backend, groups)
        if side == "rlsc_mcore":
            step = bench.our_step(trainer)
        else:
            step = bench.their_step(trainer, bench.folder, bench.sequences)
    del trainer
    gc.collect()
    step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    step()
    return resident("VmHWM") - before


def describe(result: dict[str, Any]) -> str:
    """Return one line that says whether the goal is reached."""
    utilisation, shape = result["utilisation"], result["about"]["shape"]
    if "mfu" not in utilisation:
        ratio = result["ratio"]
        return f"{shape}: {ratio:.2f} x the tokens/s of transformers with AdamW; no GPU, so no model FLOPs utilisation"
    mfu, goal = utilisation["mfu"], utilisation["goal_on_one_h200"]
    if mfu is None:
        return f"{shape}: this GPU's peak is not known ({', '.join(GPUS)} are); no model FLOPs utilisation"
    outcome = f", goal on one H200 {goal:.0%}: {'reached' if mfu >= goal else 'MISSED'}" if goal else ""
    return f"{shape}: model FLOPs utilisation {mfu:.1%}{outcome}"


def resident(field: str) -> int:
    """Return the value of one line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
