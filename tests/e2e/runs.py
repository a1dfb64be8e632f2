"""Whole runs of `rlsc train` on the embedded model: in a warm process of their own, or as a real command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

EMBEDDED = "embedded:tiny_qwen2"
TIMES = ("seconds", "rollout_tokens_per_s", "train_tokens_per_s", "memory_bytes", "memory")
FLAGS = [
    "--model.path", EMBEDDED, "--model.dtype", "float32", "--data.path", "embedded:train", "--data.questions-per-step", "4",
    "--rollout.num-samples", "4", "--rollout.max-new-tokens", "40", "--rollout.max-num-seqs", "64", "--optimizer.lr", "1e-3",
    "--training.num-steps", "4", "--training.save-every", "1",
]  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a user's command: no launcher's variables."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in launcher}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rlsc_mcore.cli", *map(str, arguments)]


def run_command(*arguments: object, timeout: float = 280, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `rlsc ...` in a process of its own."""
    return subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


def train(runs: list[list[str]], signal_at: tuple[str, int] | None = None) -> list[tuple[int, list[str]]]:
    """Run `rlsc train` once per list of flags in this (warm) process: exit codes and printed lines.

    `signal_at` = (stage, step) sends SIGTERM to this process when that stage of that step begins.
    """
    import contextlib
    import io

    from rlsc_mcore.commands import train as commands
    from rlsc_mcore.training.session import Session

    if signal_at is not None:
        stage, at = signal_at
        original = getattr(Session, stage)

        def signalled(self: Any, step: Any, *rest: Any) -> Any:
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, step, *rest)

        setattr(Session, stage, signalled)
    results = []
    for flags in runs:
        _leave_groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = commands.run_train(flags)
        results.append((code, printed.getvalue().splitlines()))
    return results


def _leave_groups() -> None:
    """Give the next run of this process what a new process has: no process groups and no launcher."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.pop("RANK", None)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what differs from run to run: times and memory."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(folder: Path) -> dict[str, Any]:
    return {
        name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()
    }


def rollouts(run_dir: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted((run_dir / "rollouts").iterdir())}


def assert_same_run(left: Path, right: Path) -> None:
    """The same metrics, answers and weights, bit for bit."""
    assert metrics(left) == metrics(right)
    assert rollouts(left) == rollouts(right)
    assert weights(left / "export") == weights(right / "export")
