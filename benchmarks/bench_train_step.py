"""Measure a training step: `python -m benchmarks.bench_train_step [--shape NAME] [--section.field VALUE
...]`.

Runs `Trainer.step` (forward, weighted loss, backward, clipping, AdamW) on packed sequences, with the layers
of a run and without an engine. Reports tokens/s, the share of attention, MLP, head, optimizer and
collectives, peak memory, and model FLOPs utilisation: FLOPs of the model (causal attention, head on trained
tokens, no recomputation) over the GPU's published bf16 rate. Every field of `rlsc train` can be set, for
example `--training.recompute full` or `--optimizer.cpu-offload 0.5`.

Correctness is checked first: loss and gradient norm of two steps must equal those of plain `transformers`
with `torch.optim.AdamW`. On a CPU that side is timed too, in turn on the same sequences (padded by length,
full logits); quote only the ratios.

    python -m benchmarks.bench_train_step                               # the embedded model, a CPU
    python -m benchmarks.bench_train_step --shape qwen2.5-1.5b          # random weights; one H200: goal 45 %
    python -m benchmarks.bench_train_step --shape qwen2.5-7b            # goal 50 %
    torchrun --nproc-per-node 2 -m benchmarks.bench_train_step --shape qwen2.5-7b --parallel.tp 2
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import RESULTS, Task, about, device_name, measure, measure_ceilings  # noqa: E402
from benchmarks.plain_transformers import accumulate, load_model, pad_by_length  # noqa: E402
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
GATE_LAYERS, GATE_SEQUENCES = (
    2,
    4,
)  # layers of the checked model on a GPU, because two whole models would not fit
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}  # freed memory returns to the system


def main() -> None:
    """Measure one shape and write <out>/train_step_<shape>.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--shape",
        default="embedded:tiny_qwen2",
        help="a public model's name, a model folder or embedded:tiny_qwen2",
    )
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument(
        "--sequences",
        type=int,
        help="sequences of a step, over all ranks (default: 40 on a GPU, 128 on a CPU)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        help="tokens of a sequence, prompt included (default: 3072 on a GPU, 96 on a CPU)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=32, help="of them the prompt, which is not trained"
    )
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="lengths between the prompt and --sequence-length instead of all equal",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps of each side, after two that are not"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results/<device>)"
    )
    parser.add_argument(
        "--memory-of",
        choices=["rlsc_mcore", "transformers"],
        help="only print that side's peak (used by itself)",
    )
    options, flags = parser.parse_known_args()
    backend = get_backend()
    options.sequences = options.sequences or (40 if backend.is_cuda else 128)
    options.sequence_length = options.sequence_length or (3072 if backend.is_cuda else 96)
    if not 0 < options.prompt_tokens < options.sequence_length:
        parser.error(
            f"--prompt-tokens: expected fewer than --sequence-length {options.sequence_length}, got "
            f"{options.prompt_tokens}"
        )
    flags = [*default_flags(find_shape(options.shape), backend), *flags]
    groups = initialize_groups(backend, int(flag_value(flags, "--parallel.tp", "1")))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, flags, backend, groups, Path(scratch))
        if options.memory_of is not None:
            print(json.dumps({"peak_bytes": bench.peak_host_bytes(options.memory_of)}), flush=True)
            os._exit(0)
        result = bench.run()
    if groups.is_main:
        text = json.dumps(result, indent=1)
        print(text)
        print(describe(result))
        out = options.out or RESULTS / device_name(backend.device)
        out.mkdir(parents=True, exist_ok=True)
        spread = f"_tp{groups.tp_size}_dp{groups.dp_size}" if groups.world_size > 1 else ""
        (out / f"train_step_{short_name(options.shape)}{spread}.json").write_text(
            text + "\n", encoding="utf-8"
        )
    groups.barrier()
    sys.stdout.flush()
    os._exit(0)  # skip the shutdown of process groups


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
    memory = (
        ["--optimizer.precision-aware", "True"]
        if has_transformer_engine()
        else ["--optimizer.cpu-offload", "0.5"]
    )
    return ["--model.dtype", "bfloat16", "--training.tokens-per-micro-batch", "3072", *memory]


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
        self.gate_folder = (
            write_config(self.shape, scratch / "gate", GATE_LAYERS) if backend.is_cuda else self.folder
        )
        self.sequences = make_sequences(options, self.shape.vocab_size)

    def run(self) -> dict[str, Any]:
        """Check, then measure everything; collective over the world."""
        gemm = measured_gemm_flops_per_s(
            self.backend, DTYPES[flag_value(self.flags, "--model.dtype", "bfloat16")]
        )
        correct = self.check()
        gc.collect()  # the checked trainer and model
        self.backend.release_cached_memory()
        trainer = make_trainer(self.folder, self.flags, self.backend, self.groups)
        ours = self.our_step(trainer)
        tasks = {"rlsc_mcore": Task(ours)}
        if not self.backend.is_cuda:
            tasks["transformers"] = Task(self.their_step(trainer, self.folder, self.sequences))
        if self.backend.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        # A single process on a CPU is timed by its own CPU seconds, so that other processes have no effect.
        # Every rank runs the same number of rounds.
        alone = not self.backend.is_cuda and self.groups.world_size == 1
        clock = time.process_time if alone else time.perf_counter
        timings = measure(tasks, self.backend.device, seconds=0.0, fewest=self.options.repeats, clock=clock)
        device_memory = self.backend.memory_bytes()
        seconds = timings["rlsc_mcore"].median_ms / 1e3
        step = self.sizes(trainer)
        result = {
            "correct": correct,
            "step": step,
            "clock": "CPU seconds of the process" if alone else "seconds",
            "timing_ms": {name: asdict(timing) for name, timing in timings.items()},
            "tokens_per_s": round(step["tokens"] / seconds, 1),
            "tokens_per_s_over_transformers": ratio(timings),
            "utilisation": self.utilisation(step["model_flops"] / seconds / self.groups.world_size, gemm),
            "share": self.shares(trainer, ours, seconds),
            "memory": self.memory(device_memory),
        }
        return {**result, "about": self.about(trainer)}

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
        config, policy = trainer.config, trainer.policy
        tensors = export_weights(
            policy.weights, policy.architecture, self.groups.tp_group, self.groups.tp_size
        )
        model = load_model(folder, tensors, DTYPES[config.model.dtype], self.backend.device)
        padded = pad_by_length(sequences, config.training.tokens_per_micro_batch)
        options, alpha, temperature = config.optimizer, config.algorithm.alpha, trainer.log_prob_temperature
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
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
        sequences = (
            self.sequences[: max(GATE_SEQUENCES, self.groups.dp_size)]
            if self.backend.is_cuda
            else self.sequences
        )
        batches = self.batches(trainer, sequences)
        theirs = self.their_step(trainer, self.gate_folder, sequences)
        losses, norms = [], []
        loss_limit, norm_limit = TOLERANCES[trainer.config.model.dtype]
        for step in range(2):  # the second step uses the first step's update
            outcome = trainer.step(batches, 0, len(sequences))
            loss, norm = theirs()
            losses.append([outcome.loss, loss])
            norms.append([outcome.grad_norm, norm])
            assert abs(outcome.loss - loss) <= loss_limit * abs(loss), (
                f"step {step + 1}: loss {outcome.loss}, transformers {loss}"
            )
            assert abs(outcome.grad_norm - norm) <= norm_limit * norm, (
                f"step {step + 1}: norm {outcome.grad_norm}, transformers {norm}"
            )
        found = {"loss_and_transformers": losses, "grad_norm_and_transformers": norms}
        return {**found, "layers": trainer.policy.megatron_config.num_layers, "sequences": len(sequences)}

    def sizes(self, trainer: Trainer) -> dict[str, Any]:
        """Count the tokens and FLOPs of a step over all ranks."""
        cost = trainer.policy.architecture.cost_model()
        lengths = [
            (len(s.rollout.prompt_ids) + len(s.rollout.response_ids), sum(s.trained)) for s in self.sequences
        ]
        return {
            "sequences": len(lengths),
            "tokens": sum(length for length, _ in lengths),
            "trained_tokens": sum(trained for _, trained in lengths),
            "micro_batches_of_a_rank": len(self.batches(trainer, self.sequences)),
            "model_flops": sum(cost.flops(*each) for each in lengths),
            "parameters": sum(
                w.parameter.numel() * (1 if w.tp_dim is None else self.groups.tp_size)
                for w in trainer.policy.weights
            ),
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
        peaks = {side: self.peak_of_child(side) for side in ("rlsc_mcore", "transformers")}
        return {
            "peak_bytes": peaks,
            "over_transformers": round(peaks["rlsc_mcore"] / peaks["transformers"], 3),
        }

    def peak_of_child(self, side: str) -> int:
        """Run this benchmark with the same arguments in a process that measures the memory of one side."""
        command = [sys.executable, "-m", "benchmarks.bench_train_step", *sys.argv[1:], "--memory-of", side]
        run = subprocess.run(
            command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        return int(json.loads(run.stdout.splitlines()[-1])["peak_bytes"])

    def peak_host_bytes(self, side: str) -> int:
        """Build one side, run two steps and return the peak of the second minus the memory before it."""
        import transformers  # noqa: F401  # import it before the measurement, for both sides

        before = resident("VmRSS")
        trainer = make_trainer(self.folder, self.flags, self.backend, self.groups)
        step = (
            self.our_step(trainer)
            if side == "rlsc_mcore"
            else self.their_step(trainer, self.folder, self.sequences)
        )
        del trainer
        gc.collect()
        step()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
        step()
        return resident("VmHWM") - before

    def about(self, trainer: Trainer) -> dict[str, Any]:
        """Return what was measured, and the command, commit and versions of the run."""
        config = trainer.config
        return {
            **about(self.backend.device),
            "shape": self.options.shape,
            "layers": trainer.policy.megatron_config.num_layers,
            "layer_implementation": "TransformerEngine"
            if trainer.policy.transformer_engine
            else "torch SDPA",
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
    timing = measure(
        {"product": Task(lambda: cpu_linear(a, b))}, backend.device, 0.0, fewest=100, clock=time.process_time
    )["product"]
    return 2.0 * 768**3 / (timing.median_ms * 1e-3)


def ratio(timings: dict[str, Any]) -> float | None:
    """Return the speed over that of `transformers`, None if it was not timed."""
    theirs = timings.get("transformers")
    return None if theirs is None else round(theirs.median_ms / timings["rlsc_mcore"].median_ms, 3)


def describe(result: dict[str, Any]) -> str:
    """Return one line that says whether the goal is reached."""
    utilisation, shape = result["utilisation"], result["about"]["shape"]
    if "mfu" not in utilisation:
        over = result["tokens_per_s_over_transformers"]
        return f"{shape}: {over:.2f} x the tokens/s of transformers with AdamW; no GPU, so no model FLOPs utilisation"
    mfu, goal = utilisation["mfu"], utilisation["goal_on_one_h200"]
    if mfu is None:
        return f"{shape}: this GPU's peak is not known ({', '.join(GPUS)} are); no model FLOPs utilisation"
    said = f"{shape}: model FLOPs utilisation {mfu:.1%}"
    return (
        said
        if goal is None
        else f"{said}, goal on one H200 {goal:.0%}: {'reached' if mfu >= goal else 'MISSED'}"
    )


def resident(field: str) -> int:
    """Return the value of one line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
