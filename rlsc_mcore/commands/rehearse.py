"""`rlsc rehearse`: run training steps of a recipe on fake GPUs and report whether they run and the peak
memory.

Needs no GPU and no weights.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rlsc_mcore.config import Config, ConfigError, RunError
from rlsc_mcore.config_file import parse_config, read_flags
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import find_model
from rlsc_mcore.planning.memory import GIB, config_layout, stage_train_bytes

PROMPT_TOKENS = 256
MICRO_BATCHES = 2
DESCRIPTION = """Take training steps of a recipe on fake GPUs: the trainer's own code on tensors that have shapes and no values.

Tells whether the recipe runs, the peak of training memory beside what `rlsc plan` counts, what a step reads back from the
device, and its collectives by process group. The engine does not run. The layers are torch's, and precision_aware and
cpu_offload use a stand-in for TransformerEngine's FusedAdam, because TransformerEngine's kernels reject fake tensors. Other
options are those of `rlsc train`."""


def run_rehearse(arguments: Sequence[str]) -> int:
    """Run `rlsc rehearse` and return 0; raises RunError if the steps fail or do not fit into the memory."""
    parser = argparse.ArgumentParser(
        "rlsc rehearse", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="configuration file")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0, help="memory of one GPU")
    parser.add_argument(
        "--layers",
        type=int,
        help="rehearse with so many of the model's layers: quicker, and no statement on memory",
    )
    parser.add_argument(
        "--rank", type=int, help="rank whose step is taken (default: the first rank of each pipeline stage)"
    )
    known, rest = parser.parse_known_args(arguments)
    flags = [*(read_flags(known.config) if known.config else []), *rest]
    config = parse_config(["--run-dir", "unused", *flags], prog="rlsc rehearse")
    shape = find_model(_local(config.model.path))
    _check(config, known)
    from rlsc_mcore.rehearsal.run import run_rank

    longest = min(config.rollout.max_new_tokens + PROMPT_TOKENS, config.training.tokens_per_micro_batch)
    micro_batches = max(MICRO_BATCHES, config.parallel.pp)  # a stage holds up to pp of them at a time
    lengths = [longest] * (micro_batches * max(1, config.training.tokens_per_micro_batch // longest))
    print(
        f"rehearsing {known.gpus} GPUs: {len(lengths)} sequences of {longest} tokens in "
        f"{micro_batches} micro-batches"
    )
    per_stage = known.gpus // config.parallel.pp
    ranks = [known.rank] if known.rank is not None else range(0, known.gpus, per_stage)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _write_shape(Path(scratch), shape, known.layers)
        for rank in ranks:
            if config.parallel.pp > 1:
                print(f"rank {rank}, pipeline stage {rank // per_stage}:")
            result = run_rank(
                ["--run-dir", scratch, *flags, "--model.path", scratch],
                folder,
                rank=rank,
                world_size=known.gpus,
                lengths=lengths,
                gpu_bytes=int(known.gpu_memory_gib * GIB),
            )
            (step,) = result["steps"]
            _print_step(step)
            if known.layers is None:
                _print_memory(step, config, shape, known, rank // per_stage)
    return 0


def _print_step(step: dict[str, Any]) -> None:
    print(
        f"it runs: {len(step['micro_batches'])} micro-batches of {max(step['micro_batches'])} tokens at most"
    )
    reads = sum(step["reads"].values())
    print(
        f"a step reads {reads} values and {sum(step['copies_to_host'].values()) / 2**20:.2f} MiB back from "
        "the device"
    )
    collectives = [f"  {count:5d} {name}" for name, count in sorted(step["collectives"].items())]
    print("\n".join(["collectives of a step (size of the group):", *(collectives or ["  none"])]))


def _print_memory(
    step: dict[str, Any], config: Config, shape: Architecture, known: argparse.Namespace, stage: int
) -> None:
    """Print the peak beside the plan; raise RunError if it does not fit into the GPU."""
    layout = config_layout(
        config, config.parallel.tp, known.gpus // (config.parallel.tp * config.parallel.pp)
    )
    planned = stage_train_bytes(
        shape, replace(layout, tokens_per_micro_batch=max(step["micro_batches"])), stage
    )
    beside = planned["engine"] + planned["contexts"]
    peak = step["peak"] + beside
    print(
        f"memory per GPU: peak {peak / GIB:.1f} GiB in training ({step['peak'] / GIB:.1f} of tensors; "
        f"{beside / GIB:.1f} for a sleeping "
        f"engine and contexts), planned {sum(planned.values()) / GIB:.1f}; {step['released'] / GIB:.1f} GiB "
        "of the trainer while sampling"
    )
    if peak > known.gpu_memory_gib * GIB:
        raise RunError(
            f"the peak of {peak / GIB:.1f} GiB does not fit into {known.gpu_memory_gib:g} GiB; see rlsc plan"
        )


def _check(config: Config, known: argparse.Namespace) -> None:
    group = config.parallel.tp * config.parallel.pp
    for name, value in (
        ("--gpus", known.gpus),
        ("--gpu-memory-gib", known.gpu_memory_gib),
        ("--layers", known.layers),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: expected more than 0, got {value}")
    if known.gpus % group:
        raise ConfigError(f"--gpus: {known.gpus} is no multiple of parallel.tp x parallel.pp = {group}")
    if known.rank is not None and not 0 <= known.rank < known.gpus:
        raise ConfigError(f"--rank: expected one of 0 to {known.gpus - 1}, got {known.rank}")


def _write_shape(folder: Path, shape: Architecture, layers: int | None) -> Path:
    """Write a config.json that `read_architecture` reads as `shape`, with `layers` layers if it is given."""
    names = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "norm_epsilon": "rms_norm_eps",
        "rotary_base": "rope_theta",
        "tied_embeddings": "tie_word_embeddings",
    }
    values = {names.get(field.name, field.name): getattr(shape, field.name) for field in fields(shape)}
    values |= {
        "architectures": [shape.name],
        "hidden_act": "silu",
        "num_hidden_layers": layers or shape.num_layers,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def _local(path: str) -> str:
    """Return the folder of an embedded model; other paths and names are returned unchanged."""
    return (
        str(resources.files("rlsc_mcore") / "assets" / path.removeprefix("embedded:"))
        if path.startswith("embedded:")
        else path
    )
