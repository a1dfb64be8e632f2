"""Back into the queue, and how often: arrays, attempts that lead nowhere, folders that another job has. The
ranks run stubs/trainer.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.jobs import Cluster, Job

pytestmark = pytest.mark.timeout(2400)
ONE_RANK = ("-N1", "--gpus-per-node=1", "--mem=1G", "--oversubscribe")
ALONE = ("--parallel.tp", "1")


def test_tasks_of_an_array_are_runs_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    """The task whose time limit is near goes back into the queue; the other one, healthy, hears nothing of
    it."""
    options = ("--array=0-1", *ONE_RANK)
    arguments = (*ALONE, "--training.seed", "%a")
    wait: dict[str, Any] = {"phase": "rollout", "step": 1, "attempt": 0, "do": "wait"}
    array = cluster.submit(tmp_path / "array", options=options, arguments=arguments, faults=[wait])
    healthy, limited = array.task(0), array.task(1)
    for task in (healthy, limited):
        task.reaches("rollout", step=1)
    limited.signal("USR1")
    limited.attempt(1)
    output = limited.ends("COMPLETED", "0:0", restarts=1)
    assert "back into the queue: saved at step_000001" in output and "resuming" in output
    assert healthy.status()["state"] == "running" and healthy.facts()["Restarts"] == "0"
    healthy.signal("USR2")
    output = healthy.ends("COMPLETED", "0:0")
    assert "TERM" not in output and healthy.status()["state"] == "stopped"
    assert ["seed: 0\n" in (task.run_dir / "config.yaml").read_text() for task in (healthy, limited)] == [
        True,
        False,
    ]
    assert {path.name for path in (limited.run_dir / "logs").iterdir()} == {
        f"{limited.id}.0",
        f"{limited.id}.1",
        "latest",
    }
    assert healthy.logs("environment.txt").count("MASTER_PORT") == 1
    assert _value(healthy, "MASTER_PORT") != _value(limited, "MASTER_PORT")


def _value(job: Job, name: str) -> str:
    return next(line for line in job.logs("environment.txt").splitlines() if line.startswith(f"{name}="))


def test_stops_without_progress_are_bounded(cluster: Cluster, tmp_path: Path) -> None:
    """As where the time limit is shorter than the start-up. A new checkpoint begins the count anew."""
    trainer = ["stopped", "saved", "stopped"]
    job = cluster.submit(
        tmp_path / "fruitless", options=ONE_RANK, arguments=ALONE, trainer=trainer, RLSC_MAX_FRUITLESS="2"
    )
    output = job.ends("FAILED", "75:0", restarts=3)
    assert output.count("back into the queue: nothing trained yet") == 1
    assert (
        output.count("back into the queue: saved at step_000002") == 2
    )  # by the second attempt, and the third, which added nothing
    assert "not requeued: 2 attempts in a row wrote no checkpoint (RLSC_MAX_FRUITLESS)" in output


def test_requeues_by_slurm_without_progress_are_bounded(cluster: Cluster, tmp_path: Path) -> None:
    """Nobody asks the launch script when an administrator, a preemption or a dying node puts the job back."""
    job = cluster.submit(
        tmp_path / "put_back", options=ONE_RANK, arguments=ALONE, trainer=["hold0"], RLSC_MAX_FRUITLESS="1"
    )
    job.reaches("start-up")
    assert cluster.call("scontrol", "requeue", job.id).returncode == 0
    output = job.ends("FAILED", "75:0", restarts=1)
    assert (
        "not started again: 1 attempts in a row wrote no checkpoint" in output
        and "TERM: SLURM is ending this job" in output
    )
    assert job.status()["state"] == "crash"


def test_node_checks_that_are_cut_off_are_bounded(cluster: Cluster, tmp_path: Path) -> None:
    """The step of the checks is cancelled, twice."""
    slow = tmp_path / "slow" / "torch"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    settings = {"RLSC_CHECK_IMPORTS": "1", "PYTHONPATH": str(slow.parent), "RLSC_MAX_RESTARTS": "1"}
    job = cluster.submit(tmp_path / "cut_off", options=ONE_RANK, arguments=ALONE, **settings)
    for attempt in range(2):
        job.wait(
            lambda attempt=attempt: f"attempt {attempt}:" in job.output() and _step_runs(job),
            f"checking, attempt {attempt}",
        )
        cluster.call("scancel", f"{job.id}.0")
        job.wait(
            lambda attempt=attempt: job.output().count("were cut off") == attempt + 1,
            "at the end of the checks",
        )
    output = job.ends("FAILED", "75:0", restarts=1)
    assert output.count("back into the queue: nothing was started") == 1
    assert (
        "not requeued: crashed 2 times (RLSC_MAX_RESTARTS=1)" in output and job.status()["state"] == "crash"
    )


def _step_runs(job: Job) -> bool:
    return f"StepId={job.id}.0 " in job.cluster.call("scontrol", "show", "step", f"{job.id}.0").stdout


def test_a_step_that_srun_refuses_is_bad_input(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "refused", options=ONE_RANK, arguments=ALONE, SLURM_PROFILE="bogus")
    output = job.ends("FAILED", "2:0")
    assert (
        "srun: error: invalid --profile=bogus option" in output
        and "rlsc: error: srun cannot start a step in this job" in output
    )
    assert job.status()["state"] == "config"


def test_a_crash_beside_a_dead_node_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    """The ranks may notice a dead node before SLURM does; without a checkpoint it must still not count as the
    run's own fault."""
    job = cluster.submit(tmp_path / "dead_node", trainer=["hold9", "done"])
    job.reaches("start-up")
    cluster.script("crash", "2")
    (job.run_dir / "go").touch()
    try:
        job.wait(lambda: job.facts()["JobState"] == "PENDING", "requeued, by SLURM or by the launch script")
    finally:
        cluster.script("revive", "2")
    output = job.ends("COMPLETED", "0:0", restarts=None)
    assert "not requeued" not in output and job.status()["state"] == "done"


def test_ids_that_start_again_are_other_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """A cluster that was set up anew counts from 1: logs and owner in the folder are of jobs that only had
    the same ids."""
    running = cluster.call(
        "sbatch",
        "--parsable",
        "-N1",
        "-J",
        "other",
        "--gpus-per-node=0",
        "--output=/dev/null",
        "--wrap",
        "sleep 3600",
        cwd=tmp_path,
    )
    other = Job(cluster, running.stdout.strip(), tmp_path)
    job = cluster.submit(
        tmp_path / "again",
        options=("--hold", *ONE_RANK),
        arguments=ALONE,
        trainer=["done"],
        RLSC_MAX_RESTARTS="1",
        RLSC_MAX_FRUITLESS="2",
    )
    for attempt in range(3):
        old = job.run_dir / "logs" / f"{job.id}.{attempt}"
        old.mkdir(parents=True)
        (old / "requeued_after_crash").touch()
        (old / "checkpoint").write_text("none\n")
    (job.run_dir / ".owner").write_text(f"{other.id}\nroot a_run_of_before\n")
    assert cluster.call("scontrol", "release", job.id).returncode == 0
    output = job.ends("COMPLETED", "0:0")
    assert "is running in" not in output
    kept = sorted(path.name.partition("_")[0] for path in (job.run_dir / "logs").iterdir())
    assert kept == [f"{job.id}.0", "before", "before", "before", "latest"]
    assert not (job.run_dir / "logs" / "latest" / "requeued_after_crash").exists()
    other.cancel()


def test_an_owner_that_will_go_on_is_respected(cluster: Cluster, tmp_path: Path) -> None:
    """A job in the queue has the folder too: it goes on there by itself."""
    waiting = cluster.submit(tmp_path / "waits", options=("--hold", *ONE_RANK))
    run_dir = tmp_path / "waits" / "runs" / "waits"
    run_dir.mkdir(parents=True)
    (run_dir / ".owner").write_text(f"{waiting.id}\nroot waits\n")
    job = cluster.submit(
        tmp_path / "intruder", options=ONE_RANK, arguments=ALONE, trainer=["done"], RUN_DIR=str(run_dir)
    )
    output = job.ends("FAILED", "2:0")
    assert f"job {waiting.id} is running in {run_dir}, or waits in the queue" in output
    assert (run_dir / ".owner").read_text().startswith(f"{waiting.id}\n") and not (
        run_dir / "status.json"
    ).exists()
    waiting.cancel()


def test_a_scheduler_that_does_not_answer_never_means_that_the_folder_is_free(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "silent"
    run_dir = folder / "runs" / "silent"
    run_dir.mkdir(parents=True)
    (run_dir / ".owner").write_text("4711\nroot silent\n")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    squeue.chmod(0o755)
    settings = {
        "PATH": f"{squeue.parent}:{_path(cluster)}",
        "RLSC_CHECK_TIMEOUT_S": "1",
        "RLSC_MAX_RESTARTS": "1",
    }
    job = cluster.submit(folder, options=ONE_RANK, arguments=ALONE, trainer=["done"], **settings)
    output = job.ends("FAILED", "75:0", restarts=1)
    assert output.count("SLURM does not say whether job 4711 still runs") == 2 and "starting" not in output
    assert (run_dir / ".owner").read_text() == "4711\nroot silent\n" and not (
        run_dir / "status.json"
    ).exists()


def _path(cluster: Cluster) -> str:
    return cluster.call("printenv", "PATH").stdout.strip()


def test_records_are_private_and_without_secrets(cluster: Cluster, tmp_path: Path) -> None:
    secrets = {
        "VLLM_API_KEY": "sk-hush",
        "RLSC_TORCH_INDEX": "https://me:hush@host.invalid/simple",
        "NCCL_TOKEN": "hush",
    }
    settings = ("--observability.wandb-project", "https://x:hush@h.invalid/?api_key=hush&a=1")
    job = cluster.submit(
        tmp_path / "secrets", options=ONE_RANK, arguments=(*ALONE, *settings), trainer=["done"], **secrets
    )
    output = job.ends("COMPLETED", "0:0")
    logs = job.run_dir / "logs" / "latest"
    written = {
        name: (logs / name).read_text()
        for name in ("command.txt", "environment.txt", "git.txt", "git.diff", "packages.txt", "hosts.txt")
    }
    assert {oct((logs / name).stat().st_mode & 0o777) for name in written} == {"0o600"}
    plan = "\n".join(line for line in output.splitlines() if "] " in line)
    for text in (plan, written["command.txt"], written["environment.txt"]):
        assert "hush" not in text
    assert (
        "VLLM_API_KEY=" in written["environment.txt"] and "host.invalid/simple" in written["environment.txt"]
    )
    assert json.loads((job.run_dir / "status.json").read_text())["state"] == "done"
