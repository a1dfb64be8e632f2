"""`rlsc status RUN`: print the state of a run from the files in its folder.

Imports no torch, so that the command is fast on a login node.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.folder import newest_checkpoint
from rlsc_mcore.run.owner import owner_state
from rlsc_mcore.run.printable import printable
from rlsc_mcore.run.progress import duration, last_metrics, seconds_left, seconds_per_step
from rlsc_mcore.run.status import ENDED, FILE, read_status

SILENT_S = 600.0  # a live run updates its status at every phase, and every few seconds during a rollout


def run_status(arguments: Sequence[str]) -> int:
    """Run `rlsc status`: print one line per fact; return 1 if the run crashed or had bad input, else 0."""
    parser = argparse.ArgumentParser("rlsc status", description="Say what a run is doing, from its files.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    known = parser.parse_args(arguments)
    facts = describe(known.run, now=time.time())
    if known.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):12} {printable(value)}")
    return int(facts["state"].startswith(("crash", "config")))


def describe(run_dir: Path, *, now: float) -> dict[str, str]:
    """Return name -> text of each fact in print order; raises `ConfigError` if `run_dir` holds no run."""
    status = read_status(run_dir)
    if status is None:
        raise ConfigError(f"{run_dir}: no run there; expected {run_dir / FILE}")
    rows = last_metrics(run_dir)
    state = str(status.get("state"))
    is_alive, owner = owner_state(run_dir)
    if state not in ENDED and is_alive is False:
        status = {
            **status,
            "state": "crash",
            "message": f"ended without a word: {owner} is gone; go on with: rlsc train --resume {run_dir}",
        }
        state = "crash"
    silent = now - float(status.get("updated", now))
    facts = {"state": state}
    if status.get("message"):
        facts["state"] += f": {status['message']}"
    if status.get("skipped_steps"):
        facts["skipped"] = (
            f"{status['skipped_steps']} steps changed nothing: their loss or gradient was not finite"
        )
    if state == "stopped":
        facts["state"] += f" by {status.get('signal') or 'another rank'}, saved"
    if state not in ENDED:
        facts["phase"] = f"{status.get('phase')}, for {duration(now - float(status.get('phase_since', now)))}"
        if silent > SILENT_S:
            facts["phase"] += f"; no news for {duration(silent)}: its job may be gone"
    else:
        facts["ended"] = f"{duration(silent)} ago, in {status.get('phase')}"
    done = int(status.get("steps_done", rows[-1]["step"] + 1 if rows else 0))
    wanted = status.get("num_steps")
    facts["steps_done"] = f"{done}" + (f" of {wanted}" if wanted else "")
    facts |= _speed(status, rows, now, state)
    left, per_step = seconds_left(rows, int(wanted or 0), done), seconds_per_step(rows)
    if wanted and state == "running" and left is not None:
        facts["time_left"] = f"about {duration(left)} ({per_step:.1f} s per step)"
    if rows:
        f_estimate = rows[-1]["f_estimate"]
        agree = "" if f_estimate is None else f"F {f_estimate:.4f}, "
        facts["last_step"] = f"loss {rows[-1]['loss']:.4f}, {agree}mean length {rows[-1]['mean_length']:.1f}"
        facts |= _agreement(rows[-1])
    checkpoint = newest_checkpoint(run_dir)
    age = duration(now - checkpoint.stat().st_mtime) if checkpoint is not None and checkpoint.exists() else ""
    facts["checkpoint"] = f"{checkpoint.name}, {age} ago" if checkpoint is not None and age else "none"
    attempts = [path for path in (run_dir / "logs").glob("*.*") if path.is_dir() and not path.is_symlink()]
    facts["restarts"] = str(max(0, len(attempts) - 1))
    if status.get("job"):
        facts["job"] = (
            f"{status['job']}, attempt {status.get('attempt', 0)}, main rank on {status.get('host')}"
        )
    return facts


def _agreement(row: dict[str, Any]) -> dict[str, str]:
    """Return the log-prob gap between trainer and engine in the last step, and the warnings of that step."""
    facts = {}
    if row.get("log_prob_gap_p99") is not None:
        mean, p99, largest = (row[f"log_prob_gap_{name}"] for name in ("mean", "p99", "max"))
        facts["engine"] = (
            f"differs from the trainer by {mean:.1e} per token, p99 {p99:.1e}, at most {largest:.1e}"
        )
    if row.get("warnings"):
        facts["warnings"] = "; ".join(row["warnings"])
    return facts


def _speed(status: dict[str, Any], rows: Sequence[dict[str, Any]], now: float, state: str) -> dict[str, str]:
    speed = {}
    if state == "running" and status.get("phase") == "rollout" and status.get("tokens"):
        seconds = max(1e-9, float(status["updated"]) - float(status["phase_since"]))
        speed["sampled"] = (
            f"{status['tokens']} tokens of finished answers, {status['tokens'] / seconds:.0f} tokens/s"
        )
    if rows:
        speed["speed"] = (
            f"rollout {rows[-1]['rollout_tokens_per_s']:.0f} tokens/s, training "
            f"{rows[-1]['train_tokens_per_s']:.0f} tokens/s"
        )
    return speed
