"""Every example runs as its first line says."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.run_folders import make_answer, make_metrics, write_run

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--rollout.num-samples", "2", "--rollout.max-new-tokens", "8", "--training.num-steps", "1"]

pytestmark = pytest.mark.e2e


def run(*command: object) -> str:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_example_is_listed() -> None:
    files = {file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".sh")}
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert files and all(f"`{name}`" in text for name in files)


def test_an_objective_of_one_s_own(tmp_path: Path) -> None:
    out = run(
        sys.executable, "examples/own_objective.py", "--config", "configs/tiny_cpu.yaml", "--run-dir", tmp_path / "run",
        "--evaluation.path", "None", "--data.questions-per-step", "2", *SHORT,
    )  # fmt: skip
    assert "step 1/1" in out


def test_own_data(tmp_path: Path) -> None:
    short = ["--rollout.num-samples", "2", "--rollout.max-new-tokens", "8", "--evaluation.num-samples", "1"]
    out = run("bash", "examples/own_data.sh", tmp_path / "run", *short)
    assert "step 2/2" in out and (tmp_path / "run" / "evaluation" / "after.json").is_file()


def test_only_the_kernels() -> None:
    assert "largest difference of the head's gradient" in run(sys.executable, "examples/kernels_only.py")


def test_only_the_hot_swap() -> None:
    out = run(sys.executable, "examples/hot_swap_only.py")
    assert "step 2: largest difference of a log-prob" in out and "version 3" in out


def test_reading_a_run(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    answers = [make_answer(question, "\\boxed{8}", right=True) for question in range(2)]
    folder = write_run(tmp_path / "run", metrics=[make_metrics(i) for i in range(3)], after=answers)
    out = run(sys.executable, "examples/read_run.py", folder)
    assert "mean_length" in out and "after:" in out


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("2*3=6\nNext 6+18=24\n\\boxed{24}", "2*3+18"),
        ("8-11=7\n7+17=24\n24+1=25", "8-11+17"),
        ("2*3=6", None),
        ("02+3=5\n5+1=6", None),
        ("no idea", None),
    ],
)
def test_a_program_is_read_from_a_solution(response: str, program: str | None) -> None:
    place = {"run_name": "program_reward"}
    read_program = runpy.run_path(str(ROOT / "examples" / "program_reward.py"), **place)["read_program"]
    assert read_program(response) == program


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs
def test_proposing_and_solving(tmp_path: Path) -> None:
    out = run(sys.executable, "examples/propose_and_solve.py", tmp_path, "--rounds", "1")
    assert re.search(r"round 0: 0\.\d+ of the proposals run, \d+ different ones; solved 0\.\d+", out)
    assert (tmp_path / "round_0" / "rank" / "export" / "config.json").is_file()
