"""What sbatch accepts and refuses, and the checks that end a job before anything has started. Nothing is
trained here."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from tests.slurm.jobs import ROOT, SCRIPT, TINY, Cluster, Job

pytestmark = pytest.mark.timeout(2400)
SCRIPTS = {path.name: path for path in (ROOT / "launch").glob("rlsc_*.sh")}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("rlsc_7b.sh", True),
        ("rlsc_1.5b_1gpu.sh", True),
        ("rlsc_7b_lora_1gpu.sh", True),
        ("rlsc_qwen3_4b_lora_1gpu.sh", True),
        ("rlsc_72b.sh", False),
    ],
)
def test_scripts_are_accepted_unmodified(cluster: Cluster, tmp_path: Path, name: str, fits: bool) -> None:
    done = cluster.call("sbatch", "--test-only", str(SCRIPTS[name]), cwd=tmp_path)
    assert (done.returncode == 0) == fits, done.stderr  # 72B wants four nodes, which are not here
    if not fits:
        assert cluster.call("sbatch", "--test-only", "-N2", str(SCRIPTS[name]), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("options", [("--gpus-per-node=9",), ("--nodes=3",), ("--partition=absent",)])
def test_sbatch_refuses_what_the_cluster_has_not(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert cluster.call("sbatch", "--test-only", *options, str(SCRIPT), cwd=tmp_path).returncode != 0


def test_a_cluster_without_gres_takes_the_override(other_cluster: Cluster, tmp_path: Path) -> None:
    done = other_cluster.call("sbatch", "--test-only", str(SCRIPT), cwd=tmp_path)
    assert done.returncode != 0 and "generic resource" in done.stderr
    assert (
        other_cluster.call("sbatch", "--test-only", "--gpus-per-node=0", str(SCRIPT), cwd=tmp_path).returncode
        == 0
    )


def test_options_and_environment_of_sbatch_win_over_the_script(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--hold", "-N2", "-t", "7", "-J", "mine", "--signal=B:USR1@60")
    done = cluster.call(
        "sbatch", "--parsable", *options, str(SCRIPT), cwd=tmp_path, SBATCH_PARTITION="urgent"
    )
    job = Job(cluster, done.stdout.strip(), tmp_path)
    facts = job.facts()
    assert facts["NumNodes"].startswith("2")
    assert (facts["TimeLimit"], facts["JobName"], facts["Partition"]) == ("00:07:00", "mine", "urgent")
    assert facts["Requeue"] == "1" and facts["WorkDir"] == str(tmp_path)
    job.cancel()


def test_two_jobs_of_one_name_run_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    def submit(name: str) -> Job:
        command = (
            "sbatch",
            "--parsable",
            "--job-name",
            name,
            "--gpus-per-node=1",
            "--begin=now+1hour",
            str(SCRIPT),
        )
        return Job(cluster, cluster.call(*command, cwd=tmp_path).stdout.strip(), tmp_path)

    first, second = submit("same"), submit("same")
    second.wait(lambda: second.facts()["Reason"] == "Dependency", "waiting for the first")
    assert first.facts()["Reason"] != "Dependency"
    first.cancel()
    second.wait(lambda: second.facts()["Reason"] != "Dependency", "free after the first has gone")
    second.cancel()


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with another configuration."""
    folder = tmp_path_factory.mktemp("old") / "run"
    folder.mkdir()
    text = (
        TINY.read_text()
        .replace("set by the launch script", str(folder))
        .replace("num_samples: 4", "num_samples: 3")
    )
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with one KV head, which two ranks cannot share."""
    folder = Path(
        shutil.copytree(resolve_model_folder("embedded:tiny_qwen2"), tmp_path_factory.mktemp("odd") / "model")
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    return folder


def test_bad_input_ends_before_any_node_is_asked(
    cluster: Cluster, tmp_path: Path, old_run: Path, odd_model: Path
) -> None:
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("--parallel.tp", "3"), {}, r"parallel\.tp: 3 does not divide the 2 ranks"),
        (("--model.path", str(odd_model)), {}, r"parallel\.tp: 2 does not divide num_key_value_heads = 1"),
        ((), {"MODEL": str(tmp_path / "absent")}, r"model\.path: no folder .*absent"),
        ((), {"DATA": str(tmp_path / "absent.jsonl")}, r"data\.path: no file .*absent\.jsonl"),
        (
            ("--run-dir", str(old_run)),
            {},
            r"holds a run with another configuration \(rollout\.num_samples: 3 -> 4\)",
        ),
        (("--optimizer.lr", "fast"), {}, r"optimizer\.lr|--optimizer\.lr"),
        (
            (),
            {"RLSC_COLLECTIVE_TIMEOUT_S": "1", "NPROC_PER_NODE": "many"},
            r"NPROC_PER_NODE: expected ranks per node",
        ),
    ]
    jobs = [
        cluster.submit(tmp_path / f"case_{i}", arguments=arguments, **environment)
        for i, (arguments, environment, _) in enumerate(cases)
    ]
    for job, (_, _, message) in zip(jobs, cases, strict=True):
        output = job.ends("FAILED", "2:0")
        errors = [line for line in output.splitlines() if "error" in line]
        assert len(errors) == 1 and re.search(message, errors[0]), output
        assert "starting" not in output
    assert sorted(path.name for path in old_run.iterdir()) == ["config.yaml"]


def test_each_node_is_checked_and_named(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "gpus", options=("-N2", "--gpus-per-node=4"), GPUS_PER_NODE="8")
    output = job.ends("FAILED", "2:0")
    for node in ("n1", "n2"):
        assert f"rlsc: error: {node}: 4 GPUs visible, 8 wanted (CUDA_VISIBLE_DEVICES=0,1,2,3)" in output
    assert job.status()["state"] == "config" and "node checks failed" in job.status()["message"]
    broken = tmp_path / "broken" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise OSError("libcudart.so.13: cannot open shared object file")\n')
    job = cluster.submit(
        tmp_path / "disk", RLSC_MIN_FREE_GB="1000000", RLSC_CHECK_IMPORTS="1", PYTHONPATH=str(broken.parent)
    )
    output = job.ends("FAILED", "2:0")
    for node in ("n1", "n2"):
        assert re.search(rf"rlsc: error: {node}: \d+ GB free in", output)
        assert (
            f"{node}: {sys.executable} cannot import vllm: OSError: libcudart.so.13: cannot open shared "
            "object file;" in output
        )
    assert output.count("rlsc: error") == 4  # one line each


def test_a_run_folder_that_is_not_shared_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    job_folder, elsewhere = tmp_path / "private", tmp_path / "elsewhere"
    run_dir = job_folder / "runs" / "private"
    for folder in (run_dir, elsewhere):
        folder.mkdir(parents=True)
    cluster.script("in", "2", "mount", "--bind", str(elsewhere), str(run_dir))  # on the second node only
    try:
        output = cluster.submit(job_folder).ends("FAILED", "2:0")
    finally:
        cluster.script("in", "2", "umount", str(run_dir))
    assert f"rlsc: error: n2: run_dir {run_dir} is not the folder that the first node sees" in output
    assert "error: n1" not in output


def test_a_run_folder_in_use_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.call(
        "sbatch", "--parsable", "-N1", "--output=/dev/null", "--wrap", "sleep 3600", cwd=tmp_path
    )
    owner = Job(cluster, done.stdout.strip(), tmp_path)
    owner.wait(lambda: owner.facts()["JobState"] == "RUNNING", "running")
    run_dir = tmp_path / "busy" / "runs" / "busy"
    run_dir.mkdir(parents=True)
    (run_dir / ".owner").write_text(f"{owner.id}\n")
    job = cluster.submit(tmp_path / "busy", options=("-N1",), arguments=("--parallel.tp", "1"))
    assert f"job {owner.id} is running in" in job.ends("FAILED", "2:0")
    owner.cancel()


def test_a_dry_run_on_the_login_node_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """The plan itself is checked without SLURM (tests/unit/test_launch_scripts.py)."""
    before = cluster.call("scontrol", "show", "jobs").stdout.count("JobId=")
    variables = {
        "PYTHON": sys.executable,
        "RLSC_CONFIG": str(TINY),
        "NPROC_PER_NODE": "4",
        "RUN_DIR": "runs/a b",
    }
    done = cluster.call(
        "bash", str(SCRIPT), "--dry-run", "--training.num-steps", "7", cwd=tmp_path, **variables
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "1 nodes x 4 ranks (8 GPUs each)",
        "tp 2 x dp 2",
        "steps       7",
        f"run_dir     {tmp_path}/runs/a b",
        "NCCL_DEBUG=WARN",
    ):
        assert part in done.stdout
    assert (
        not list(tmp_path.iterdir())
        and cluster.call("scontrol", "show", "jobs").stdout.count("JobId=") == before
    )
