"""A run that `training.stop_on` ends: saved, with the best checkpoint's weights in engine and export."""

import json
from pathlib import Path

from rlsc_mcore.run.folder import best_checkpoint_of, newest_checkpoint
from tests.e2e.runs import FLAGS, metrics, run_command, train, weights
from tests.helpers.ranks import run_ranks

STOP = ["--training.stop-on", "same_answer_share>1", "loss<1e9", "--training.stop-after", "2",
        "--training.keep-best", "agreement", "--training.keep-last", "5"]  # fmt: skip


def test_a_run_ends_early_and_exports_its_best_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ((code, lines),) = run_ranks(1, train, [["--run-dir", str(run_dir), *FLAGS, *STOP]])[0]
    assert code == 0
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["agreement"] <= 1 and row["distinct_answers"] > 0 for row in rows)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["stopped_on"], summary["engine_equals_export"]) == (2, "loss<1e9", True)
    assert any("stopped after step 2 of 4: loss<1e9 held in 2 steps in a row" in line for line in lines)
    best, newest = best_checkpoint_of(run_dir), newest_checkpoint(run_dir)
    assert best is not None and newest is not None and best != newest, "no step measured the last weights"
    exported = run_command("export", run_dir, "--checkpoint", "best", "--output", tmp_path / "best")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert weights(run_dir / "export") == weights(tmp_path / "best")
    ((code, _),) = run_ranks(1, train, [["--resume", str(run_dir)]])[0]
    assert code == 0 and len(metrics(run_dir)) == 2, "the condition still holds: no further step"
    assert weights(run_dir / "export") == weights(tmp_path / "best")
