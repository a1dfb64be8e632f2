"""The paper's experiment end to end with the embedded model: every command of the chain, then its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "reproduce_table2.sh"
SMALL = [
    *("--arms", "shuffled_weights", "--seeds", "0", "--steps", "1,2"),
    *("--evaluation.max-questions", "6", "--data.questions-per-step", "4", "--rollout.max-new-tokens", "40"),
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_chain_runs_here(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--local", "--sizes", "tiny", "--output", str(tmp_path), *SMALL]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    rows = [
        line.split(" | ")[0].strip("| ")
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| | ")
    ]
    trained = ["shuffled_weights, 1 steps", "shuffled_weights, 2 steps"]
    # The table, the changes, pass@k and the temperatures.
    assert rows == [
        "base, chat",
        "base, none",
        *trained,
        *trained,
        "base, chat",
        "base, none",
        *trained,
        "base, chat",
        "base, none",
    ]
    assert (
        "embedded:train †" in text
        and "embedded:validation, k = 4" in text
        and "embedded:validation, T = 0.25" in text
    )
    table = json.loads((tmp_path / "table2.json").read_text(encoding="utf-8"))["tiny"]
    for cells in table["rows"].values():
        assert list(cells) == ["embedded:train", "embedded:validation"]
        assert all(
            cell["questions"] == 6 and cell["low"] < cell["high"]
            for both in cells.values()
            for cell in both.values()
        )
