"""`rlsc probe`: the step at which a condition first held, and what is refused. tests/e2e trains one."""

from pathlib import Path

import pytest

from rlsc_mcore.commands.probe import CONDITIONS, first_step, run_probe
from rlsc_mcore.config import ConfigError
from rlsc_mcore.training.stop_rules import StopCondition
from tests.helpers.run_folders import make_metrics, write_run


def rows(*lengths):
    return [make_metrics(step) | {"mean_length": length} for step, length in enumerate(lengths)]


def test_a_condition_counts_from_consecutive_steps():
    condition = StopCondition.parse("mean_length<0.5x")
    assert first_step(rows(10, 4, 6, 4, 3, 6, 1), condition, 2) == 4
    assert first_step(rows(10, 4, 6, 4), condition, 2) is None
    assert first_step(rows(10, 4, 6, 4), condition, 1) == 1


def test_the_default_conditions_are_read_by_the_run():
    assert [StopCondition.parse(text).text for text in CONDITIONS] == list(CONDITIONS)


def test_runs_are_reported_each_with_its_step(tmp_path: Path, capsys):
    write_run(tmp_path / "falls", metrics=rows(10, 9, 4, 4, 4))
    write_run(tmp_path / "stays", metrics=rows(10, 9, 9, 9, 9))
    command = ["--runs", str(tmp_path / "falls"), str(tmp_path / "stays"), "--conditions", "mean_length<0.5x"]
    assert run_probe(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'falls'}: training.stop_on would end it after 5 steps" in printed
    assert f"{tmp_path / 'stays'}: no collapse in 5 steps" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config: expected the configuration file"),
        (["--runs", "absent"], "--runs absent: no steps in its metrics.jsonl"),
        (
            ["--runs", "x", "--training.seed", "1"],
            "--runs: reads runs and trains nothing, got --training.seed",
        ),
        (["--runs", "x", "--config", "y"], "--runs: reads runs and trains nothing, got --config"),
        (["--runs", "x", "--conditions", "lenght<1"], "--conditions: 'lenght<1': no metric lenght"),
        (["--runs", "x", "--stop-after", "0"], "--stop-after: expected at least 1, got 0"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(arguments, expected):
    with pytest.raises(ConfigError) as error:
        run_probe(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)
