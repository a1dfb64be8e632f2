"""`bash launch/rlsc_*.sh --dry-run` on a machine without SLURM, GPU or container runtime: the whole plan, and nothing is made."""

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
    """Run a script from an empty folder; returns its exit code, its errors and the plan, by the name of each line."""

    def run(*arguments: str, script: str = "rlsc_7b.sh", **settings: str) -> tuple[int, str, dict[str, list[str]]]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RLSC_")) and name not in SETTINGS}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**inherited, "PATH": path, "PYTHON": sys.executable, "HOME": str(tmp_path), **settings}
        command = ["bash", str(ROOT / "launch" / script), "--dry-run", *SMALL, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
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
    assert set(plan) >= {"run_dir", "model", "data", "layout", "steps", "start", "memory", "checkpoint", "step", "each rank", "env"}
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
    code, errors, plan = dry_run("--parallel.tp", "2", CONTAINER="registry/rlsc:1", MOUNTS="/data:/data,/models:/models", PYTHON="")
    assert code == 0, errors
    mounts = f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data,/models:/models"
    assert shlex.split(plan["step"][0])[-3:] == ["--container-image=registry/rlsc:1", mounts, f"--container-workdir={tmp_path}"]
    assert shlex.split(plan["each rank"][0])[:4] == ["python3", "-m", "rlsc_mcore.cli", "train"]


def test_apptainer_runs_each_rank_in_a_file(dry_run: DryRun, tmp_path: Path) -> None:
    code, errors, plan = dry_run("--parallel.tp", "2", CONTAINER="/images/rlsc.sif", MOUNTS="/data:/data", PYTHON="")
    assert code == 0, errors
    assert "container" not in plan["step"][0]
    bind = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    expected = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", bind, "/images/rlsc.sif", "python3", "-m", "rlsc_mcore.cli"]
    assert shlex.split(plan["each rank"][0])[: len(expected)] == expected


def test_memory_that_is_not_there_is_warned_of(dry_run: DryRun) -> None:
    flags = ("--parallel.tp", "2", "--training.tokens-per-micro-batch", "262144")
    assert "warning" not in dry_run(*flags)[2] and "warning" not in dry_run(*flags, GPU_MEMORY_GIB="80")[2]
    code, _, plan = dry_run(*flags, GPU_MEMORY_GIB="4")
    assert code == 0 and "of 4 are usable" in plan["warning"][0]


def test_a_setting_that_the_engine_cannot_have_is_warned_of(dry_run: DryRun) -> None:
    code, _, plan = dry_run("--parallel.tp", "1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert code == 0 and any("expandable_segments and the engine's sleep mode exclude each other" in name for name in plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TP": "3"}, "parallel.tp: 3 does not divide the 8 ranks"),
        ({"NPROC_PER_NODE": "many"}, "NPROC_PER_NODE: expected ranks per node, at least 1, got 'many'"),
        ({"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE: expected a number, got 'x'"),
        ({"PYTHON": "/absent/python"}, "PYTHON: no program /absent/python"),
        ({"GPU_MEMORY_GIB": "much"}, "GPU_MEMORY_GIB: expected GiB, more than 0, got 'much'"),
    ],
)
def test_bad_settings_are_one_line(dry_run: DryRun, settings: dict[str, str], message: str) -> None:
    code, errors, _ = dry_run(**settings)
    assert code == 2 and errors.startswith(f"rlsc: error: {message}") and errors.count("\n") == 1
