"""How a job ends when nobody stopped it: done, crashed, crashed again at the same place, hung. One rank where
one is enough."""

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, TINY, Cluster, Job, result

pytestmark = pytest.mark.timeout(2400)
ONE_RANK = ("-N1",)
ALONE = ("--parallel.tp", "1")


def test_a_run_leaves_what_reproduces_it(uninterrupted: Job) -> None:
    run_dir = uninterrupted.run_dir
    output = next(uninterrupted.folder.glob("*.out")).read_text()
    logs = run_dir / "logs" / "latest"
    written = {
        "rank_0.log",
        "rank_1.log",
        "command.txt",
        "environment.txt",
        "packages.txt",
        "git.txt",
        "git.diff",
    }
    assert {path.name for path in logs.iterdir()} >= written
    assert (logs / "hosts.txt").read_text() == "n1\nn2\n"
    assert "-m rlsc_mcore.cli train --config" in (logs / "command.txt").read_text()
    assert re.search(r"^torch==", (logs / "packages.txt").read_text(), re.MULTILINE)
    assert (
        "RLSC_TEST_FAULTS=" in (logs / "environment.txt").read_text() and (run_dir / "config.yaml").is_file()
    )
    steps = re.findall(r"step \d/4 .*", output)
    assert len(steps) == 4 and steps == re.findall(
        r"step \d/4 .*", (logs / "rank_0.log").read_text()
    )  # console: the main rank
    assert uninterrupted.status()["state"] == "done"


def test_arguments_arrive_unsplit_with_an_empty_environment(cluster: Cluster, tmp_path: Path) -> None:
    """sbatch --export=NONE: no variable of the user's arrives, so that the checkout's own .venv runs two
    ranks, one per GPU.

    A run folder and a file with spaces and quotes in their names go with it.
    """
    checkout = tmp_path / "check out"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch", "configs", "rlsc_mcore"):
        (checkout / name).symlink_to(ROOT / name)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run_dir, data = tmp_path / "a  run 'quoted'", tmp_path / "my questions.jsonl"
    data.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "1+2?", "answer": 3}\n')
    arguments = [
        "--config",
        str(TINY),
        "--run-dir",
        str(run_dir),
        "--data.path",
        str(data),
        "--training.num-steps",
        "1",
    ]
    options = (*ONE_RANK, "--gpus-per-node=2", "--export=NONE")
    job = cluster.submit(
        tmp_path / "bare", options=options, arguments=arguments, script=checkout / "launch" / "rlsc_7b.sh"
    )
    output = job.ends("COMPLETED", "0:0")
    assert "tp 2 x dp 1" in output and (run_dir / "export" / "model.safetensors").is_file()
    assert (run_dir / "logs" / "latest" / "rank_1.log").is_file()
    environment = (run_dir / "logs" / "latest" / "environment.txt").read_text()
    assert "RLSC_CONFIG" not in environment and "RLSC_CHECK_IMPORTS" not in environment  # the submitter's
    assert (
        "checking 1 nodes: checkout, run folder, GPUs, imports, disk" in output
    )  # the packages were imported there: the default


def test_crash_restarts_after_progress_and_stops_at_the_same_place(cluster: Cluster, tmp_path: Path) -> None:
    fault = {"phase": "train", "step": 1, "do": "exit", "value": 3}
    job = cluster.submit(tmp_path / "crash", options=ONE_RANK, arguments=ALONE, faults=[fault])
    output = job.ends("FAILED", "3:0", restarts=1)
    assert output.count("back into the queue: crashed, but the run had moved on") == 1
    assert "not requeued: no checkpoint since this attempt began" in output
    assert output.count("rank 0 on n1 failed first, exit 3") == 2
    assert job.status()["state"] == "crash" and "rank 0 on n1 exited with code 3" in job.status()["message"]


def test_crash_before_any_checkpoint_does_not_loop(cluster: Cluster, tmp_path: Path) -> None:
    """A Python exception on the second rank: its own log is shown, its exit code is the job's, its words are
    the status.

    The worst order: the main rank says what it does next only after the other's crash, and is killed then.
    """
    crash = {"phase": "rollout", "step": 0, "rank": 1, "do": "raise"}
    late = {"phase": "rollout", "step": 0, "rank": 0, "do": "hold", "value": "ending.json", "early": True}
    stuck = {"phase": "rollout", "step": 0, "rank": 0, "do": "hold", "value": "never"}
    job = cluster.submit(tmp_path / "early", faults=[crash, late, stuck])
    output = job.ends("FAILED", "1:0")
    assert "rank 1 on n2 failed first, exit 1" in output and "RuntimeError: injected in rollout" in output
    assert job.status()["state"] == "crash" and "injected in rollout" in job.status()["message"]
    assert "back into the queue" not in output


def test_a_killed_rank_is_named_though_it_could_not_say_anything(cluster: Cluster, tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    fault = {"phase": "rollout", "step": 0, "rank": 1, "do": "kill"}
    job = cluster.submit(
        tmp_path / "killed",
        faults=[fault, {"phase": "rollout", "step": 0, "rank": 0, "do": "hold", "value": "never"}],
    )
    output = job.ends("FAILED", "137:0")
    assert "rank 1 on n2 failed first, exit 137" in output
    assert job.status()["state"] == "crash" and "rank 1 on n2 exited with code 137" in job.status()["message"]


def test_a_hung_rank_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    fault = {"phase": "train", "step": 0, "rank": 1, "do": "stop"}
    job = cluster.submit(tmp_path / "hung", faults=[fault], RLSC_DEAD_AFTER_S="30")
    job.ends("FAILED", "1:0")
    assert job.status()["state"] == "crash" and "rank 1" in job.status()["message"]


def test_two_jobs_on_the_same_nodes_do_not_meet(cluster: Cluster, tmp_path: Path) -> None:
    """Two runs of two ranks share both nodes: rendezvous ports, shared memory and results stay apart."""
    options = ("-N2", "--oversubscribe", "--gpus-per-node=4", "--mem=8G", "--cpus-per-task=2")
    faults = [{"phase": "rollout", "do": "hold", "value": "go"}]
    one_step = ("--training.num-steps", "1")
    jobs = [
        cluster.submit(tmp_path / name, options=options, arguments=one_step, faults=faults)
        for name in ("left", "right")
    ]
    for job in jobs:
        job.reaches("rollout")
    for job in jobs:
        (job.run_dir / "go").touch()
    for job in jobs:
        job.ends("COMPLETED", "0:0")
    assert result(jobs[0].run_dir) == result(jobs[1].run_dir)
