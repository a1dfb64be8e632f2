"""Measure how long a run is held up when a node dies: python -m tests.chaos.node_kill [--runs 3] [--output
FILE]

On a local SLURM of three nodes a run of two nodes is trained, one of them is powered off in a training step,
and SLURM starts the job again on the node that was free. The time from then to the next finished step has two
parts: SLURM's (it must miss the node, put the job back and start it), and the run's own (checks, imports,
loading, sampling, the step). Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlsc_mcore.training.announce import versions
from tests.slurm.jobs import Cluster

KILLED_IN_STEP = 2  # counted from 0: two steps are finished
GOALS = {"seconds": 120.0, "own_seconds": 30.0, "lost_steps": 0}


def measure(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Kill the second node of a new run; returns the times in seconds and the finished steps that were
    lost."""
    hold = {"phase": "train", "step": KILLED_IN_STEP, "attempt": 0, "do": "hold", "value": "never"}
    job = cluster.submit(folder, options=("-N2", "-w", "n1"), faults=[hold])
    job.reaches("train", step=KILLED_IN_STEP)
    rows = (job.run_dir / "metrics.jsonl").read_text().count("\n")
    cluster.script("crash", "2")
    killed = time.monotonic()
    job.attempt(1)
    started = time.monotonic()
    job.wait(
        lambda: job.status().get("attempt") == 1 and job.status().get("steps_done", 0) > KILLED_IN_STEP,
        "beyond the step it was killed in",
    )
    finished = time.monotonic()
    output = job.ends("COMPLETED", "0:0", restarts=1)
    resumed = output.rpartition("resuming ")[2].partition(" at step ")[2].split()[0].rstrip(",;:")
    cluster.script("revive", "2")
    return {
        "seconds": round(finished - killed, 1),
        "slurm_seconds": round(started - killed, 1),
        "own_seconds": round(finished - started, 1),
        "lost_steps": rows - int(resumed),
    }


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the result there")
    known = parser.parse_args()
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="rlsc_node_kill_"))
    cluster = Cluster(folder / "cluster", nodes=3)
    folder.chmod(0o755)
    try:
        cluster.start()
        runs = [measure(cluster, folder / f"run_{number}") for number in range(known.runs)]
    finally:
        cluster.script("stop")
        shutil.rmtree(folder)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result = {
        "command": f"python -m tests.chaos.node_kill --runs {known.runs}",
        "versions": versions(),
        "processors": os.cpu_count(),
        "load_before": round(load, 2),
        "slurm": "SlurmdTimeout=30, cred_expire=6 (tests/slurm/cluster.sh)",
        "goals": GOALS,
        "median": medians,
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if known.output:
        known.output.write_text(text + "\n")
    return int(any(medians[name] > goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
