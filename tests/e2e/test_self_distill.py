"""Self-distillation through `rlsc train`: answers are compared, the teacher reads one, and a stopped run goes
on bit for bit."""

from pathlib import Path

import pytest

from tests.e2e.runs import FLAGS, assert_same_run, metrics, train
from tests.helpers.ranks import run_ranks

DISTILL = ["--algorithm.objective", "self_distill", "--rollout.temperature", "1.0", "--rollout.num-samples", "6",
           "--distill.min-share", "0.2", "--algorithm.rewards", "any"]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--distill.teacher", "start", "--distill.divergence", "jsd"],
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, more: list[str]) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*FLAGS, *DISTILL, *more]
    ((code, _),) = run_ranks(1, train, [["--run-dir", str(whole), *flags]])[0]
    assert code == 0
    rows = metrics(whole)
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows), rows
    assert all(row["log_prob_gap_max"] < 1e-4 for row in rows)
    ((code, _),) = run_ranks(1, train, [["--run-dir", str(stopped), *flags]], ("train", 1))[0]
    assert code == 0
    ((code, _),) = run_ranks(1, train, [["--resume", str(stopped)]])[0]
    assert code == 0
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_adapters_keep_the_starting_weights_of_the_teacher(tmp_path: Path) -> None:
    """In the first step the adapters are zero: the teacher and the loss are those of a run without them."""
    flags = [*FLAGS, *DISTILL, "--distill.teacher", "start", "--training.num-steps", "2"]
    runs = [["--run-dir", str(tmp_path / "full"), *flags], ["--run-dir", str(tmp_path / "lora"), *flags]]
    runs[1] += ["--lora.rank", "4", "--optimizer.lr", "1e-2"]
    assert [code for code, _ in run_ranks(1, train, runs)[0]] == [0, 0]
    full, lora = metrics(tmp_path / "full"), metrics(tmp_path / "lora")
    assert lora[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-5)
    assert lora[1]["loss"] > 0 and lora[1]["log_prob_gap_max"] < 1e-4
