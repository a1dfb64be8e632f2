"""Objectives through `rlsc train`: `nsd` with a resume, and questions without signal that are left out."""

from pathlib import Path

import pytest

from tests.e2e.runs import FLAGS, assert_same_run, metrics, train
from tests.helpers.ranks import run_ranks


def test_nsd_trains_with_one_sample_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [
        *FLAGS,
        *["--algorithm.objective", "nsd", "--rollout.num-samples", "1", "--training.num-steps", "3"],
    ]
    ((code, _),) = run_ranks(1, train, [["--run-dir", str(whole), *flags]])[0]
    assert code == 0
    rows = metrics(whole)
    assert abs(rows[0]["kl_start"]) < 1e-9 < rows[-1]["kl_start"]
    assert all(row["grad_norm"] > 0 for row in rows)
    ((code, _),) = run_ranks(1, train, [["--run-dir", str(stopped), *flags]], ("train", 1))[0]
    assert code == 0
    ((code, _),) = run_ranks(1, train, [["--resume", str(stopped)]])[0]
    assert code == 0
    assert_same_run(stopped, whole)


def test_questions_without_signal_cost_nothing_and_change_nothing(tmp_path: Path) -> None:
    """With `reduction sum`, a sample without advantage adds nothing to the loss: leaving it out must not
    either."""
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    flags = [
        *FLAGS,
        *["--algorithm.objective", "empo", "--algorithm.reduction", "sum", "--training.num-steps", "1"],
    ]
    flags += ["--rollout.temperature", "0.3", "--algorithm.overlong-tokens", "10"]
    for run_dir, more in ((kept, []), (dropped, ["--algorithm.drop-groups", "True"])):
        ((code, _),) = run_ranks(1, train, [["--run-dir", str(run_dir), *flags, *more]])[0]
        assert code == 0
    (before,), (after,) = metrics(kept), metrics(dropped)
    assert before["dropped_share"] is None and 0 < after["dropped_share"] < 1
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert after["train_tokens"] < before["train_tokens"]
