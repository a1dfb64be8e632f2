"""`bash launch/rlsc_*.sh --dry-run` on a machine without SLURM, GPU or container runtime: the whole plan, and
nothing is made."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("rlsc_*.sh"))
SETTINGS = (
    "MODEL",
    "DATA",
    "TP",
    "RUN_DIR",
    "CONTAINER",
    "MOUNTS",
    "MASTER_PORT",
    "GPUS_PER_NODE",
    "NPROC_PER_NODE",
    "GPU_MEMORY_GIB",
    "PYTORCH_CUDA_ALLOC_CONF",
)
SMALL = ("--model.path", "embedded:tiny_qwen2", "--data.path", "embedded:train", "--model.dtype", "float32")

DryRun = Callable[..., tuple[int, str, dict[str, list[str]]]]


@pytest.fixture
def dry_run(tmp_path: Path) -> DryRun:
    """Run a script from an empty folder; returns its exit code, its errors and the plan, by the name of each
    line."""

    def run(
        *arguments: str, script: str = "rlsc_7b.sh", **settings: str
    ) -> tuple[int, str, dict[str, list[str]]]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "RLSC_")) and name not in SETTINGS
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**inherited, "PATH": path, "PYTHON": sys.executable, "HOME": str(tmp_path), **settings}
        command = ["bash", str(ROOT / "launch" / script), "--dry-run", *SMALL, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        plan: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            name, _, value = line.partition("] ")[2].strip().partition("  ")
            plan.setdefault(name, []).append(value.strip())
        assert not list(tmp_path.iterdir())
        return done.returncode, done.stderr, plan

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_plan(dry_run: DryRun, script: str) -> None:
    code, errors, plan = dry_run("--parallel.tp", "1", script=script, GPUS_PER_NODE="1")
    assert code == 0, errors
    assert set(plan) >= {
        "run_dir",
        "model",
        "data",
        "layout",
        "steps",
        "start",
        "memory",
        "checkpoint",
        "step",
        "each rank",
        "env",
    }
    nodes = 4 if "72b" in script else 1
    assert any(f"{nodes} nodes x 1 ranks (1 GPUs each)" in name for name in plan)
    assert [line.split()[0] for line in plan["memory"]] == ["training", "rollout"]


def test_a_plain_step_names_no_container(dry_run: DryRun, tmp_path: Path) -> None:
    code, errors, plan = dry_run("--parallel.tp", "2", "--training.num-steps", "7", RUN_DIR="a b")
    assert code == 0, errors
    assert shlex.split(plan["step"][0]) == [
        "srun", "--nodes=1", "--ntasks=8", "--ntasks-per-node=8", "--cpus-per-task=1", "--cpu-bind=none", "--mpi=none",
        "--kill-on-bad-exit=1", "--wait=60",
    ]  # fmt: skip
    config = str(ROOT / "configs" / "qwen2.5_math_7b_1x8.yaml")
    rank = [sys.executable, "-m", "rlsc_mcore.cli", "train", "--config", config, "--run-dir", "a b", *SMALL]
    assert shlex.split(plan["each rank"][0]) == [*rank, "--parallel.tp", "2", "--training.num-steps", "7"]
    assert plan["run_dir"] == [str(tmp_path / "a b")] and plan["steps"] == ["7"]


def test_pyxis_starts_the_step_in_an_image(dry_run: DryRun, tmp_path: Path) -> None:
    code, errors, plan = dry_run(
        "--parallel.tp", "2", CONTAINER="registry/rlsc:1", MOUNTS="/data:/data,/models:/models", PYTHON=""
    )
    assert code == 0, errors
    mounts = f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data,/models:/models"
    assert shlex.split(plan["step"][0])[-3:] == [
        "--container-image=registry/rlsc:1",
        mounts,
        f"--container-workdir={tmp_path}",
    ]
    assert shlex.split(plan["each rank"][0])[:4] == ["python3", "-m", "rlsc_mcore.cli", "train"]


def test_apptainer_runs_each_rank_in_a_file(dry_run: DryRun, tmp_path: Path) -> None:
    code, errors, plan = dry_run(
        "--parallel.tp", "2", CONTAINER="/images/rlsc.sif", MOUNTS="/data:/data", PYTHON=""
    )
    assert code == 0, errors
    assert "container" not in plan["step"][0]
    bind = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    expected = [
        "apptainer",
        "exec",
        "--nv",
        "--pwd",
        str(tmp_path),
        "--bind",
        bind,
        "/images/rlsc.sif",
        "python3",
        "-m",
        "rlsc_mcore.cli",
    ]
    assert shlex.split(plan["each rank"][0])[: len(expected)] == expected


def test_memory_that_is_not_there_is_warned_of(dry_run: DryRun) -> None:
    flags = ("--parallel.tp", "2", "--training.tokens-per-micro-batch", "262144")
    assert "warning" not in dry_run(*flags)[2] and "warning" not in dry_run(*flags, GPU_MEMORY_GIB="80")[2]
    code, _, plan = dry_run(*flags, GPU_MEMORY_GIB="4")
    assert code == 0 and "of 4 are usable" in plan["warning"][0]


def test_a_setting_that_the_engine_cannot_have_is_warned_of(dry_run: DryRun) -> None:
    code, _, plan = dry_run("--parallel.tp", "1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert code == 0 and any(
        "expandable_segments and the engine's sleep mode exclude each other" in name for name in plan
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TP": "12"}, "parallel.tp: 12 does not divide the 8 ranks"),
        ({"NPROC_PER_NODE": "many"}, "NPROC_PER_NODE: expected ranks per node, at least 1, got 'many'"),
        ({"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE: expected a number, got 'x'"),
        ({"PYTHON": "/absent/python"}, "PYTHON: no program /absent/python"),
        ({"GPUS_PER_NODE": "08"}, "GPUS_PER_NODE: expected a number, got '08'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: expected a port, got '70000'"),
        ({"RLSC_MAX_RESTARTS": "-1"}, "RLSC_MAX_RESTARTS: expected restarts, at least 0, got '-1'"),
        ({"RLSC_MAX_FRUITLESS": "0"}, "RLSC_MAX_FRUITLESS: expected attempts, at least 1, got '0'"),
        ({"RLSC_CHECK_TIMEOUT_S": "5m"}, "RLSC_CHECK_TIMEOUT_S: expected seconds, at least 1, got '5m'"),
        ({"GPU_MEMORY_GIB": "much"}, "GPU_MEMORY_GIB: expected GiB, more than 0, got 'much'"),
    ],
)
def test_bad_settings_are_one_line(dry_run: DryRun, settings: dict[str, str], message: str) -> None:
    code, errors, _ = dry_run(**settings)
    assert code == 2 and errors.startswith(f"rlsc: error: {message}") and errors.count("\n") == 1


def in_bash(script: str, file: str, **environment: str) -> str:
    """Source a file of launch/ and run a script; returns what it prints."""
    command = ["bash", "-euo", "pipefail", "-c", f'source "{ROOT / "launch" / file}"\n{script}']
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "CUDA_VISIBLE_DEVICES" and not name.startswith("SLURM_")
    }
    done = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("gpu:8", 8),
        ("gres:gpu:4", 4),
        ("gres/gpu:a100:2", 2),
        ("gres:gpu:a100_1g.5gb:7", 7),
        ("gres:gpu:a100:2,gres:gpu:v100:1", 3),
        ("gpu:8(IDX:0-3,5)", 8),
        ("gres:gpu", 1),
        ("gpu:a100", 1),
        ("gres:license:3", 0),
        ("", 0),
    ],
)
def test_gpus_of_a_gres_are_counted(text: str, gpus: int) -> None:
    assert in_bash(f"_rlsc_count_gpus '{text}'", "job.sh").strip() == str(gpus)


@pytest.mark.parametrize(
    ("per_node", "option"),
    [
        ("gres:gpu:8", "8"),
        ("gres:gpu", "1"),
        ("gres/gpu:a100:2", "a100:2"),
        ("gres:gpu:a100:2,gres:gpu:v100:1", "a100:2,v100:1"),
        ("gres:lic:1", ""),
    ],
)
def test_gpus_that_were_asked_for_become_an_option(per_node: str, option: str) -> None:
    script = (
        f"record='JobId=1 NumNodes=1 Command=/x WorkDir=/x TresPerNode={per_node} '; _rlsc_asked_gpus || true"
    )
    assert in_bash(script, "job.sh").strip() == option


@pytest.mark.parametrize(
    ("cpus", "least"), [("16", 16), ("16,8", 8), ("16(x2),8,12(x3)", 8), ("9(x4)", 9), ("128,64(x31)", 64)]
)
def test_the_smallest_node_counts(cpus: str, least: int) -> None:
    assert in_bash("_rlsc_least_cpus", "job.sh", SLURM_JOB_CPUS_PER_NODE=cpus).strip() == str(least)


SLICE = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["MIG slice of GPU 0", "MIG slice of GPU 0", "1"]),
        ("1", ["1"]),
        ("0,1", ["MIG slice of GPU 0", "1"]),
        (SLICE, [f"MIG {SLICE}"]),
        ("GPU-f8ba1df9-e6f2-4b6a-a1b1-9f0e5a7c2d10", ["GPU-f8ba1df9-e6f2-4b6a-a1b1-9f0e5a7c2d10"]),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_slices_are_told_from_whole_gpus(visible: str | None, devices: list[str]) -> None:
    """By a stub of nvidia-smi with two GPUs, of which the first is cut into two slices."""
    path = f"{ROOT / 'tests' / 'slurm' / 'stubs' / 'mig'}:{os.environ['PATH']}"
    environment = {"PATH": path} if visible is None else {"PATH": path, "CUDA_VISIBLE_DEVICES": visible}
    assert in_bash("rlsc_visible_devices", "node.sh", **environment).splitlines() == devices


def test_the_compiler_caches_are_private(tmp_path: Path) -> None:
    """A folder that is somebody else's, or a link, is not used: compilers load libraries from there."""
    script = 'rlsc_private_caches; echo "$TRITON_CACHE_DIR"; stat -c %a "$RLSC_NODE_CACHE"; ls -d "$RLSC_NODE_CACHE"'
    mine, link = tmp_path / "mine", tmp_path / "link"
    link.symlink_to(tmp_path)

    def run(folder: Path) -> list[str]:
        environment = {
            "RLSC_NODE_CACHE": str(folder),
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TMPDIR": str(tmp_path),
        }
        return in_bash(script, "node.sh", **environment).splitlines()

    assert run(mine) == [f"{mine}/triton", "700", str(mine)]
    mine.chmod(0o777)  # a folder of one's own is closed again
    assert run(mine)[1] == "700"
    warning, cache, mode, folder = run(link)
    assert "belongs to somebody else" in warning and cache == f"{folder}/triton" and mode == "700"
    assert folder.startswith(f"{tmp_path}/rlsc_cache.") and not Path(folder).exists()  # removed at the end


def test_secrets_are_taken_out_of_text() -> None:
    text = "https://me:pw@host/x?api_key=1&a=2 s3://id@bucket plain user@host"
    assert (
        in_bash(f"_rlsc_without_secrets <<<'{text}'", "job.sh").strip()
        == "https://***@host/x?api_key=***&a=2 s3://***@bucket plain user@host"
    )
