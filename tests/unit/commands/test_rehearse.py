"""`rlsc rehearse`: what it refuses, and the shape that it hands on."""

from pathlib import Path

import pytest

from rlsc_mcore.commands.rehearse import _write_shape, run_rehearse
from rlsc_mcore.config import ConfigError
from rlsc_mcore.model.shape import read_architecture
from rlsc_mcore.planning.known_models import MODELS

RECIPE = ["--model.path", "Qwen/Qwen2.5-7B", "--data.path", "embedded:train"]


@pytest.mark.parametrize("name", list(MODELS))
def test_the_shape_of_a_model_survives(tmp_path: Path, name: str) -> None:
    assert read_architecture(_write_shape(tmp_path, MODELS[name], None)) == MODELS[name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--gpus", "6", "--parallel.tp", "4"],
            r"--gpus: 6 is no multiple of parallel\.tp x parallel\.pp = 4",
        ),
        (["--gpus", "0"], "--gpus: expected more than 0, got 0"),
        (["--gpus", "2", "--rank", "2"], "--rank: expected one of 0 to 1, got 2"),
        (["--gpus", "4", "--parallel.pp", "3"], r"--gpus: 4 is no multiple of .* = 3"),
        (["--gpus", "1", "--optimizer.lr", "-1"], r"optimizer\.lr: expected more than 0"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_rehearse([*RECIPE, *flags])
