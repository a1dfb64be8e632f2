"""`rlsc probe` trains a run of its own and writes the steps of its conditions."""

import json
from pathlib import Path

import pytest

from rlsc_mcore.commands.probe import run_probe

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
SMALL = ["--data.questions-per-step", "2", "--rollout.num-samples", "2", "--rollout.max-new-tokens", "8"]


def test_a_probe_trains_without_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One condition holds at every step, the other never does; the same command again trains nothing."""
    conditions = ["--conditions", "mean_length>0", "mean_length<0", "--stop-after", "2"]
    command = ["--config", str(CONFIG), "--steps", "2", "--output", str(tmp_path), *conditions, *SMALL]
    assert run_probe(command) == 0
    run = tmp_path / "probe_seed0"
    assert not (run / "evaluation").exists()
    found = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    steps = {"mean_length>0": 1, "mean_length<0": None}
    assert found["runs"] == {str(run): {"num_steps": 2, "steps": steps}}
    assert run_probe(command) == 0
    assert "1 of 1 runs are there already" in capsys.readouterr().out
