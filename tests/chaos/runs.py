"""Run `rlsc train` on the embedded model with faults inside and outside of it, until it is done."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.jobs import FAULTS, TINY, result

PHASES = ("start-up", "rollout", "train", "swap", "save", "export")
STEPS = 4
DEAD_AFTER_S = 45.0  # a rank of a busy machine is not dead; one that is dead is told after this
PATIENCE_S = 600.0
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")


@dataclass(frozen=True)
class Layout:
    """Ranks of a run and how they share the model."""

    name: str
    ranks: int
    tp: int

    def command(self, run_dir: Path, arguments: Sequence[str] = ()) -> list[str]:
        """Return the command that starts the run, or goes on with it."""
        trainer = [
            "-m",
            "rlsc_mcore.cli",
            "train",
            "--config",
            str(TINY),
            "--run-dir",
            str(run_dir),
            "--parallel.tp",
            str(self.tp),
            *arguments,
        ]
        if self.ranks == 1:
            return [sys.executable, *trainer]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.ranks}",
            *trainer,
        ]


LAYOUTS = (Layout("one rank", 1, 1), Layout("tp 2", 2, 2), Layout("dp 2", 2, 1))


@dataclass
class Attempt:
    """A started run: its leader is a process group of its own, so that a signal can reach all of it."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    log: Path

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the end; a run that does not end is a fault of its own."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            text = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(
                f"the run did not end within {seconds:g} s\n{status(self.run_dir)}\n{text}"
            ) from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill what is left of the group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()

    def ranks(self) -> list[int]:
        """Return the ids of the ranks' processes: the leader itself, or torchrun's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            found = [int(child) for child in children.read_text().split()]
        except OSError:
            found = []
        trainers = [pid for pid in found if b"rlsc_mcore.cli" in _command_line(pid)]
        return trainers or [self.process.pid]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def start(
    layout: Layout,
    run_dir: Path,
    log: Path,
    faults: Sequence[dict[str, Any]] = (),
    arguments: Sequence[str] = (),
) -> Attempt:
    """Start the run in the background, with faults by phase as in tests/slurm/faults."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RLSC_"))
    }
    path = [str(FAULTS), str(Path(__file__).resolve().parents[2]), inherited.get("PYTHONPATH", "")]
    environment = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "RLSC_TEST_FAULTS": json.dumps(list(faults)),
        "RLSC_DEAD_AFTER_S": str(DEAD_AFTER_S),
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            layout.command(run_dir, arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    return Attempt(process, run_dir, log)


def status(run_dir: Path) -> dict[str, Any]:
    """Return status.json, or nothing."""
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def fault_inside(draw: random.Random, layout: Layout) -> dict[str, Any]:
    """Draw a fault that a rank does to itself at the beginning of a phase."""
    fault: dict[str, Any] = {
        "phase": draw.choice(PHASES),
        "step": draw.randrange(STEPS),
        "rank": draw.randrange(layout.ranks),
        "do": draw.choice(["exit", "kill", "raise"]),
        "value": 3,
    }
    if fault["phase"] in ("start-up", "swap", "export"):
        del fault["step"]
    return fault


def disturb_outside(draw: random.Random, attempt: Attempt, longest_s: float) -> str:
    """Wait a random time and do something to a random rank or to all of them; returns what was done."""
    delay = draw.uniform(0.0, longest_s)
    end = time.monotonic() + delay
    while time.monotonic() < end and attempt.process.poll() is None:
        time.sleep(0.05)
    if attempt.process.poll() is not None:
        return f"nothing within {delay:.1f} s"
    kind = draw.choice([*SIGNALS, "pause", "twice"])
    everybody = draw.random() < 0.5
    targets = attempt.ranks() if everybody else [draw.choice(attempt.ranks())]
    numbers = (
        [signal.SIGSTOP]
        if kind == "pause"
        else [signal.SIGTERM] * 2
        if kind == "twice"
        else [signal.Signals[kind]]
    )
    for number in numbers:
        _send(targets, number)
    if kind == "pause":
        time.sleep(draw.uniform(0.0, 5.0))
        _send(targets, signal.SIGCONT)
    return f"{kind} to {len(targets)} of {len(attempt.ranks())} processes after {delay:.1f} s"


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def damage(draw: random.Random, run_dir: Path) -> str:
    """Damage the newest checkpoint, where there is an older one to fall back to, or the pointer to it;
    returns what was done."""
    checkpoints = sorted((run_dir / "checkpoints").glob("step_??????"))
    if checkpoints and draw.random() < 0.25:
        return _damage_pointer(draw, run_dir / "checkpoints" / "latest", checkpoints[0].name)
    if len(checkpoints) < 2:
        return "no damage: fewer than two checkpoints"
    newest = checkpoints[-1]
    file = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    kind = draw.choice(["truncate", "flip", "delete", "empty"])
    content = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
    elif kind == "empty" or not content:
        file.write_bytes(b"")
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return f"{kind} {newest.name}/{file.name}"


def _damage_pointer(draw: random.Random, pointer: Path, oldest: str) -> str:
    """Write something else into `latest`, which is a hint only; returns what was done."""
    text = draw.choice([None, "", "step_999999", "../..", "\0\xff", oldest])
    if text is None:
        pointer.unlink(missing_ok=True)
    else:
        pointer.write_text(text)
    return f"latest: {text!r}"


def is_done(run_dir: Path) -> bool:
    """Tell whether the run has come to its end."""
    return status(run_dir).get("state") == "done"


def comparable(run_dir: Path) -> Any:
    """Return what two equal runs have in common: weights and metrics, without times."""
    weights, rows = result(run_dir)
    return weights, rows
