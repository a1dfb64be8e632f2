"""Jobs that are stopped, preempted or lose a node: they come back and end with the weights of the run that
nothing disturbed.

Nothing sleeps here: a rank that a test wants to find in some phase waits there until it is asked to stop (see
faults/).
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.jobs import EVALUATED, Cluster, Job, result

pytestmark = pytest.mark.timeout(2400)


def wait_in(phase: str, *, step: int | None = None, attempt: int = 0) -> dict[str, Any]:
    """Let every rank wait there until it is asked to stop."""
    return {"phase": phase, "do": "wait", "attempt": attempt, **({} if step is None else {"step": step})}


def preempt(cluster: Cluster, folder: Path) -> None:
    """Submit a job of higher priority that wants both nodes for a moment."""
    done = cluster.call(
        "sbatch", "-N2", "-p", "urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1", cwd=folder
    )
    assert done.returncode == 0, done.stderr


def evaluations(run_dir: Path) -> dict[str, Any]:
    """Return the scores before and after."""
    return {
        name: json.loads((run_dir / "evaluation" / f"{name}.json").read_text())
        for name in ("before", "after")
    }


def test_signals_in_every_phase_chain_to_the_same_weights(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    """One job, signalled as before its time limit in each phase (in the rollout twice): it saves, goes back
    and goes on."""
    phases = [
        ("start-up", 0, "nothing trained yet"),
        ("evaluate", 0, "saved at step_000000"),
        ("rollout", 0, "saved at step_000000"),
        ("train", 0, "saved at step_000001"),
        ("swap", None, "saved at step_000002"),
        ("save", 3, "saved at step_000003"),
        ("evaluate", 4, "saved at step_000004"),
    ]
    faults = [wait_in(phase, step=step, attempt=attempt) for attempt, (phase, step, _) in enumerate(phases)]
    job = cluster.submit(tmp_path / "phases", faults=faults, arguments=EVALUATED)
    for attempt, (phase, _, _) in enumerate(phases):
        job.reaches(phase, attempt=attempt)
        job.signal("USR1")
        if phase == "rollout":
            job.signal("USR1")
        job.attempt(attempt + 1)
    output = job.ends("COMPLETED", "0:0", restarts=len(phases))
    assert re.findall(r"back into the queue: (.*)", output) == [told for _, _, told in phases]
    assert "before anything was trained; the same command starts it again" in output
    assert re.search(r"resuming .*step_000002 at step 2", output)
    assert result(job.run_dir) == result(uninterrupted.run_dir)
    assert evaluations(job.run_dir) == evaluations(uninterrupted.run_dir)
    # Every attempt's logs are there, of every rank, and one output file has them all.
    logs = job.run_dir / "logs"
    attempts = [f"{job.id}.{attempt}" for attempt in range(len(phases) + 1)]
    assert {path.name for path in logs.iterdir()} == {*attempts, "latest"}
    assert all((logs / name / f"rank_{rank}.log").is_file() for name in attempts for rank in (0, 1))
    assert [output.count(f"attempt {attempt}:") for attempt in range(len(phases) + 1)] == [1] * (
        len(phases) + 1
    )


def test_preemption_with_grace_saves_and_comes_back(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    job = cluster.submit(tmp_path / "preempted", faults=[wait_in("rollout", step=2)])
    job.reaches("rollout", step=2)
    preempt(cluster, tmp_path)
    output = job.ends("COMPLETED", "0:0", restarts=1)
    assert result(job.run_dir) == result(uninterrupted.run_dir)
    assert "stopped by SIGTERM and saved" in output and "back into the queue: saved at step_000002" in output


def test_node_crash_resumes_from_the_last_checkpoint(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    job = cluster.submit(
        tmp_path / "crash",
        faults=[{"phase": "train", "step": 2, "attempt": 0, "do": "hold", "value": "never"}],
    )
    job.reaches("train", step=2)
    cluster.script("crash", "2")
    job.wait(lambda: job.facts()["JobState"] == "PENDING", "back in the queue after its node died")
    cluster.script("revive", "2")
    output = job.ends("COMPLETED", "0:0", restarts=1)
    assert result(job.run_dir) == result(uninterrupted.run_dir)
    assert re.search(r"resuming .*step_000002 at step 2", output)


def test_save_longer_than_the_grace_keeps_the_previous_checkpoint(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    """The preempted job is killed while it saves, or before where the machine is slow: both must leave step 2
    whole."""
    faults = [
        wait_in("train", step=2),
        {"phase": "save", "step": 3, "attempt": 0, "do": "hold", "value": "never"},
    ]
    job = cluster.submit(tmp_path / "slow_save", options=("-N2", "-p", "hasty"), faults=faults)
    job.reaches("train", step=2)
    preempt(cluster, tmp_path)
    output = job.ends("COMPLETED", "0:0", restarts=1)
    assert "step_000003" not in output.split("attempt 1")[0]
    assert re.search(r"resuming .*step_000002 at step 2", output)
    assert result(job.run_dir) == result(uninterrupted.run_dir)


def test_stopped_for_good_and_gone_on_with_by_the_next_job_of_its_name(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    """Three sbatch of one command: each waits for the one before (singleton), and goes on where that one
    stopped."""
    folder = tmp_path / "quit"
    first = cluster.submit(folder, faults=[wait_in("rollout", step=1)])
    second = cluster.submit(folder, options=("-N2", "--no-requeue"), faults=[wait_in("rollout", step=2)])
    third = cluster.submit(folder)
    first.reaches("rollout", step=1)
    assert {job.facts()["Reason"] for job in (second, third)} == {"Dependency"}
    first.signal("USR2")
    first.ends("COMPLETED", "0:0")
    assert (first.run_dir / "checkpoints" / "latest").read_text() in (
        "step_000001\n",
        "step_000002\n",
    )  # the second may be there
    second.reaches("rollout", step=2)
    assert third.facts()["Reason"] == "Dependency"
    second.signal("USR1")  # without the right to be requeued: exit 75
    output = second.ends("FAILED", "75:0")
    assert "submit the same command again to go on in" in output and "at step 1" in output
    output = third.ends("COMPLETED", "0:0")
    assert "at step 2" in output and result(third.run_dir) == result(uninterrupted.run_dir)


def test_scancel_never_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "cancelled", faults=[wait_in("train", step=1)])
    job.reaches("train", step=1)
    job.cancel()
    output = job.ends("CANCELLED", None)  # by SIGTERM, or SIGKILL where saving takes longer than KillWait
    assert "TERM: SLURM is ending this job" in output and "back into the queue" not in output


def test_real_time_limit(cluster: Cluster, uninterrupted: Job, tmp_path: Path) -> None:
    """Nobody signals but SLURM, a minute before the end of the three that the job has (it may do so 30 s
    early)."""
    options = ("-N2", "-t", "3", "--signal=B:USR1@60")
    job = cluster.submit(tmp_path / "three_minutes", options=options, faults=[wait_in("rollout", step=1)])
    output = job.ends("COMPLETED", "0:0", restarts=None)
    assert "USR1: the time limit is near" in output and "stopped by SIGUSR1" in output
    assert result(job.run_dir) == result(uninterrupted.run_dir)


def test_preemption_that_sends_the_jobs_own_signal(
    other_cluster: Cluster, uninterrupted: Job, tmp_path: Path
) -> None:
    """preempt_send_user_signal: batch shell and ranks get USR1, the ranks twice; and a cluster without
    GRES."""
    options = ("-N2", "--gpus-per-node=0")
    job = other_cluster.submit(
        tmp_path / "user_signal", options=options, faults=[wait_in("rollout", step=2)], GPUS_PER_NODE="0"
    )
    job.reaches("rollout", step=2)
    preempt(other_cluster, tmp_path)
    output = job.ends("COMPLETED", "0:0", restarts=1)
    assert "USR1: the time limit is near" in output and "back into the queue: saved at step_000002" in output
    assert result(job.run_dir) == result(uninterrupted.run_dir)
