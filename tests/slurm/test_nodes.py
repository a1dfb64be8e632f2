"""What the job was given: nodes that differ, GPUs asked for in other ways, slices, leftovers of an outer job,
containers.

The ranks run stubs/trainer.py, which prints what it was started with.
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, STUBS, Cluster, Job

pytestmark = pytest.mark.timeout(2400)
ALONE = ("--parallel.tp", "1")


def ranks(job: Job, number: int) -> list[dict[str, str]]:
    """Return what each rank said of itself, with the node as "host"."""
    said = []
    for rank in range(number):
        found = re.search(r"^stub on (\S+) (\{.*?\})", job.logs(f"rank_{rank}.log"), re.MULTILINE)
        assert found is not None, job.logs(f"rank_{rank}.log")
        said.append({"host": found[1], **dict(re.findall(r"'(\w+)': '([^']*)'", found[2]))})
    return said


def test_nodes_with_different_numbers_of_cpus(uneven_cluster: Cluster, tmp_path: Path) -> None:
    """16 and 8 CPUs: a step that gives each rank its share of the first node's is refused on the second."""
    options = ("-N2", "--gpus-per-node=2")
    arguments = ("--parallel.tp", "2", "--data.questions-per-step", "4")
    job = uneven_cluster.submit(
        tmp_path / "uneven", options=options, arguments=arguments, trainer=["done"], NPROC_PER_NODE="2"
    )
    output = job.ends("COMPLETED", "0:0")
    assert "--cpus-per-task=4 " in output
    said = ranks(job, 4)
    assert [(rank["host"], rank["LOCAL_RANK"]) for rank in said] == [
        ("n1", "0"),
        ("n1", "1"),
        ("n2", "0"),
        ("n2", "1"),
    ]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) for rank in said} == {
        ("4", "2", "n1")
    }


def test_more_ranks_than_cpus_share_them(uneven_cluster: Cluster, tmp_path: Path) -> None:
    options = ("-N1", "--gpus-per-node=0", "--oversubscribe", "--cpus-per-task=1", "--mem=1G")
    job = uneven_cluster.submit(
        tmp_path / "crowded", options=options, trainer=["done"], GPUS_PER_NODE="0", NPROC_PER_NODE="2"
    )
    output = job.ends("COMPLETED", "0:0")
    assert "warning: a node has fewer CPUs than ranks" in output and len(ranks(job, 2)) == 2


def test_gpus_asked_for_in_all(uneven_cluster: Cluster, tmp_path: Path) -> None:
    """--gpus=N says nothing of a node: the smallest number that SLURM gave to one counts on all."""
    plain = tmp_path / "plain.sh"  # as a user's own recipe: no --gpus-per-node in its header
    plain.write_text(
        re.sub(
            r"(?m)^#SBATCH --(gpus-per-node|exclusive).*\n", "", (ROOT / "launch" / "rlsc_7b.sh").read_text()
        )
    )
    options = ("-N2", "--gpus=6", "--mem=1G")
    settings = {"RLSC_ROOT": str(ROOT), "NPROC_PER_NODE": "", "PATH": _without_driver(uneven_cluster)}
    arguments = (*ALONE, "--data.questions-per-step", "16")
    job = uneven_cluster.submit(
        tmp_path / "in_all", options=options, arguments=arguments, script=plain, trainer=["done"], **settings
    )
    output = job.ends("COMPLETED", "0:0")
    given = [
        int(count)
        for count in re.findall(
            r"gpu:a100_1g.5gb:(\d+)\(", uneven_cluster.call("scontrol", "show", "job", "-d", job.id).stdout
        )
    ]
    least = int(re.search(r"2 nodes x (\d+) ranks", output)[1])  # type: ignore[index]
    assert least >= 1 and f"({least} GPUs each)" in output
    assert sum(given) in (0, 6) and (
        not given or least == min(given)
    )  # SLURM may have forgotten the GPUs of a job that is over
    assert len(ranks(job, 2 * least)) == 2 * least


def _without_driver(cluster: Cluster) -> str:
    return cluster.call("printenv", "PATH").stdout.strip()


def _with_stubs(cluster: Cluster, name: str) -> str:
    return f"{STUBS / name}:{_without_driver(cluster)}"


def test_an_exclusive_node_gives_the_gpus_that_were_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        tmp_path / "half",
        options=("-N1", "--exclusive", "--gpus-per-node=4"),
        arguments=ALONE,
        trainer=["done"],
    )
    job.ends("COMPLETED", "0:0")
    assert ranks(job, 1)[0]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_ranks_on_slices_of_a_gpu_are_refused(uneven_cluster: Cluster, tmp_path: Path) -> None:
    """Two slices, or a whole GPU and a slice, cannot work together; one rank on one slice can, and types are
    no obstacle."""
    path = _with_stubs(uneven_cluster, "mig")
    options = ("-N1", "-w", "n1", "--mem=1G", "--oversubscribe")
    job = uneven_cluster.submit(
        tmp_path / "slices",
        options=(*options, "--gpus-per-node=a100_1g.5gb:2"),
        trainer=["done"],
        PATH=path,
        NPROC_PER_NODE="2",
    )
    output = job.ends("FAILED", "2:0")
    assert "rlsc: error: n1: 1 of the 2 GPUs are slices (MIG)" in output and job.status()["state"] == "config"
    job = uneven_cluster.submit(
        tmp_path / "slice",
        options=(*options, "--gpus-per-node=a100_1g.5gb:1"),
        arguments=ALONE,
        trainer=["done"],
        PATH=path,
    )
    assert "(1 GPUs each)" in job.ends("COMPLETED", "0:0")


def test_leftovers_of_an_outer_job_are_ignored(cluster: Cluster, tmp_path: Path) -> None:
    """sbatch from inside a job passes on what that job's srun and sbatch had set; some of it excludes what
    this job has."""
    leftovers = {
        "SLURM_MEM_PER_CPU": "1000",
        "SLURM_MEM_PER_GPU": "1000",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_TRES_PER_TASK": "cpu:64",
        "SLURM_TRES_BIND": "gres/gpu:single:1",
        "SLURM_GPUS": "1",
        "SLURM_GPUS_PER_TASK": "4",
        "SLURM_CPUS_PER_TASK": "64",
        "SRUN_CPUS_PER_TASK": "64",
        "SLURM_NTASKS": "7",
        "SLURM_NTASKS_PER_NODE": "7",
        "SLURM_DISTRIBUTION": "arbitrary",
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "9",
        "SLURM_STDOUTMODE": "none",
        "SLURM_HET_SIZE": "2",
    }
    job = cluster.submit(tmp_path / "inner", options=("-N2", "--mem=2G"), trainer=["done"], **leftovers)
    output = job.ends("COMPLETED", "0:0")
    assert "attempt 0: 2 nodes x 1 ranks (8 GPUs each)" in output and "srun: error" not in output
    assert (job.run_dir / "logs" / f"{job.id}.0" / "rank_1.log").is_file()
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in ranks(job, 2)] == ["0,1,2,3,4,5,6,7"] * 2


def test_pyxis_runs_every_step_in_the_image(cluster: Cluster, tmp_path: Path) -> None:
    """A stub stands in for pyxis: it records each call of srun, and runs it without the container."""
    folder, calls = tmp_path / "pyxis run", tmp_path / "calls"
    settings = {
        "CONTAINER": "registry#rlsc:1",
        "MOUNTS": "/opt:/opt",
        "STUB_CALLS": str(calls),
        "PATH": _with_stubs(cluster, "pyxis"),
    }
    job = cluster.submit(folder, trainer=["done"], **settings)
    job.ends("COMPLETED", "0:0")
    steps = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert len(steps) == 3  # the input's check, the nodes' checks, the ranks
    mounts = f"--container-mounts={ROOT}:{ROOT},{folder}:{folder},/opt:/opt"
    for step in steps:
        assert {"--container-image=registry#rlsc:1", mounts, f"--container-workdir={folder}"} <= set(step)
    assert "rlsc_mcore.planning.launch_checks" in steps[0] and "rlsc_mcore.cli" in steps[2]
    assert [rank["RANK"] for rank in ranks(job, 2)] == ["0", "1"]


def test_an_image_that_cannot_be_started_is_bad_input(cluster: Cluster, tmp_path: Path) -> None:
    settings = {
        "CONTAINER": "broken",
        "STUB_CALLS": str(tmp_path / "calls"),
        "PATH": _with_stubs(cluster, "pyxis"),
    }
    job = cluster.submit(tmp_path / "broken", trainer=["done"], **settings)
    output = job.ends("FAILED", "2:0")
    assert (
        "pyxis: failed to import docker image" in output and "look at CONTAINER=broken and MOUNTS" in output
    )


def test_apptainer_runs_every_rank_in_the_file(cluster: Cluster, tmp_path: Path) -> None:
    """A stub stands in for apptainer: it records each call, and runs the command that follows the image."""
    folder, calls = tmp_path / "apptainer", tmp_path / "calls"
    image = tmp_path / "an image.sif"
    settings = {"CONTAINER": str(image), "STUB_CALLS": str(calls), "PATH": _with_stubs(cluster, "apptainer")}
    job = cluster.submit(folder, trainer=["done"], **settings)
    job.ends("COMPLETED", "0:0")
    recorded = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert len(recorded) == 1 + 2 + 2  # the input's check, a check on each node, a rank on each node
    expected = [
        "exec",
        "--nv",
        "--pwd",
        str(folder),
        "--bind",
        f"{ROOT}:{ROOT},{folder}:{folder}",
        str(image),
        str(STUBS / "python"),
    ]
    for call in recorded:
        assert call[: len(expected)] == expected
    assert sum("rlsc_mcore.cli" in call for call in recorded) == 2
    assert sorted(rank["host"] for rank in ranks(job, 2)) == ["n1", "n2"]
