"""A run that was stopped, killed or refused: nothing is lost, and what goes on equals the uninterrupted run
bit for bit."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.run.folder import find_resumable
from rlsc_mcore.training.checkpoint_files import read_state, verify_files
from tests.e2e.runs import FLAGS, assert_same_run, command, environment, metrics, run_command, train, weights
from tests.helpers.ranks import run_ranks


def flags(run_dir: Path, *more: str) -> list[str]:
    return ["--run-dir", str(run_dir), *FLAGS, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ((code, _),) = run_ranks(1, train, [flags(run_dir)])[0]
    assert code == 0
    return run_dir


def test_the_run_learnt_something_and_wrote_it_all(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and [row["policy_version"] for row in rows] == [
        0,
        1,
        2,
        3,
    ]
    assert all(row["log_prob_gap_max"] < 1e-4 and row["grad_norm"] > 0 for row in rows)
    assert {
        "config.yaml",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "export",
        "summary.json",
        "tensorboard",
    } <= {p.name for p in whole.iterdir()}
    assert not list(whole.rglob("*.partial"))


@pytest.mark.parametrize(
    ("stage", "at", "done"),
    [
        pytest.param("sample", 0, 0, id="first sampling", marks=pytest.mark.slow),
        pytest.param("sample", 2, 2, id="sampling"),
        pytest.param("train", 0, 1, id="first training"),
        pytest.param("train", 1, 2, id="training", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, stage: str, at: int, done: int
) -> None:
    run_dir = tmp_path / "run"
    ((code, lines),) = run_ranks(1, train, [flags(run_dir)], (stage, at))[0]
    assert code == 0
    assert lines[-1] == f"stopped by SIGTERM and saved; go on with: rlsc train --resume {run_dir}"
    assert read_state(find_resumable(run_dir)).steps_done == done and not (run_dir / "export").exists()
    ((code, lines),) = run_ranks(1, train, [["--resume", str(run_dir)]])[0]
    assert code == 0 and any(
        line == f"resuming {find_resumable(run_dir).with_name(f'step_{done:06d}')} at step {done}"
        for line in lines
    )
    assert_same_run(run_dir, whole)


def test_a_run_can_be_made_longer(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = flags(run_dir, "--training.num-steps", "2")
    results = run_ranks(1, train, [short, ["--resume", str(run_dir), "--training.num-steps", "4"]])[0]
    assert [code for code, _ in results] == [0, 0]
    assert_same_run(run_dir, whole)


def test_the_same_command_again_finishes_and_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    config = (run_dir / "config.yaml").read_text(encoding="utf-8").replace(str(whole), str(run_dir))
    (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    results = run_ranks(1, train, [flags(run_dir), ["--resume", str(run_dir)]])[0]
    assert [code for code, _ in results] == [0, 0]
    assert_same_run(run_dir, whole)


def train_with_the_optimizer_on_the_host(
    runs: list[list[str]], signal_at: tuple[str, int]
) -> list[tuple[int, list[str]]]:
    """What optimizer.offload_during_rollout does on a GPU, between two places of the host's memory."""
    from rlsc_mcore.training.offload import StateOffload
    from rlsc_mcore.training.step import Trainer

    build = Trainer.__init__

    def build_with_offload(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.offload = StateOffload(self.optimizer, self.memory()["weights"].keys(), pin=False)

    Trainer.__init__ = build_with_offload  # type: ignore[method-assign]
    return train(runs, signal_at)


@pytest.mark.slow
def test_the_optimizer_may_leave_while_the_engine_samples(whole: Path, tmp_path: Path) -> None:
    """Saved from the host while it is out, stopped, resumed: nothing differs."""
    run_dir = tmp_path / "run"
    asynchronous = flags(run_dir, "--training.async-save", "True")
    ((code, _),) = run_ranks(1, train_with_the_optimizer_on_the_host, [asynchronous], ("sample", 2))[0]
    assert code == 0 and read_state(find_resumable(run_dir)).steps_done == 2
    ((code, _),) = run_ranks(
        1, train_with_the_optimizer_on_the_host, [["--resume", str(run_dir)]], ("sample", 99)
    )[0]
    assert code == 0
    assert_same_run(run_dir, whole)


@pytest.mark.timeout(900)  # real commands, whose imports alone take long on a busy machine
def test_kill_9_and_a_real_stop_of_the_real_command(whole: Path, tmp_path: Path) -> None:
    """The command itself: killed once, told to stop once, then left to finish."""
    run_dir = tmp_path / "run"
    for number, steps in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        with (tmp_path / "printed").open("w", encoding="utf-8") as printed:
            process = subprocess.Popen(
                command("train", *flags(run_dir)),
                env=environment(),
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            limit = time.monotonic() + 300
            while not (run_dir / "metrics.jsonl").is_file() or len(metrics_lines(run_dir)) < steps:
                assert process.poll() is None and time.monotonic() < limit, (tmp_path / "printed").read_text(
                    encoding="utf-8"
                )
                time.sleep(0.005)
            process.send_signal(number)
            code = process.wait(300)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        if number == signal.SIGTERM and not (run_dir / "summary.json").exists():
            said = (tmp_path / "printed").read_text(encoding="utf-8")
            assert said.rstrip().endswith(
                f"stopped by SIGTERM and saved; go on with: rlsc train --resume {run_dir}"
            )
        if (run_dir / "checkpoints" / "latest").exists():
            verify_files(find_resumable(run_dir))
    assert run_ranks(1, train, [flags(run_dir)])[0][0][0] == 0
    assert_same_run(run_dir, whole)


def metrics_lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.timeout(600)
def test_another_configuration_is_refused_and_nothing_overwritten(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    refused = run_command("train", *flags(whole, "--optimizer.lr", "2e-3"))
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "holds a run with another configuration (optimizer.lr: 0.001 -> 0.002)" in refused.stderr
    refused = run_command("train", "--resume", whole, "--rollout.temperature", "0.9")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "cannot change rollout.temperature: 0.5 -> 0.9" in refused.stderr
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()} == before


def test_other_questions_are_refused_on_resume(tmp_path: Path) -> None:
    run_dir, data = tmp_path / "run", tmp_path / "questions.jsonl"
    data.write_text('{"problem": "Compute 1+1."}\n{"problem": "Compute 2+1."}\n', encoding="utf-8")
    short = flags(
        run_dir, "--data.path", str(data), "--training.num-steps", "1", "--data.questions-per-step", "2"
    )
    assert run_ranks(1, train, [short])[0][0][0] == 0
    data.write_text('{"problem": "Compute 1+1."}\n{"problem": "Compute 2+2."}\n', encoding="utf-8")
    with pytest.raises(RuntimeError, match="has changed since the run was started"):
        run_ranks(1, train, [["--resume", str(run_dir), "--training.num-steps", "2"]])


@pytest.mark.timeout(600)
def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(whole: Path, tmp_path: Path) -> None:
    """No file may grow beyond 1 MB: the metrics are written, the checkpoint cannot be."""
    import resource

    run_dir = tmp_path / "run"
    assert run_ranks(1, train, [flags(run_dir, "--training.num-steps", "2")])[0][0][0] == 0
    kept = find_resumable(run_dir)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    stopped = run_command("train", "--resume", run_dir, "--training.num-steps", "4", preexec_fn=limit)
    assert stopped.returncode == 1, stopped.stderr
    (line,) = stopped.stderr.splitlines()
    assert line.startswith(f"rlsc train: checkpoint of step 3 not saved to {run_dir / 'checkpoints'}: ")
    assert find_resumable(run_dir) == kept
    verify_files(kept)
    assert run_ranks(1, train, [["--resume", str(run_dir), "--training.num-steps", "4"]])[0][0][0] == 0
    assert_same_run(run_dir, whole)
    assert weights(run_dir / "export")
