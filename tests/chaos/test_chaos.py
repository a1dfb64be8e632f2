"""Rounds of random faults: each run is disturbed several times, resumed after each, and ends bit-equal to the
undisturbed run."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.runs import (
    LAYOUTS,
    Layout,
    comparable,
    damage,
    disturb_outside,
    fault_inside,
    is_done,
    start,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]
MOST_FAULTS = 3  # of one round


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the undisturbed run of each layout ends with, filled in when a round first needs it; and how long
    it takes."""
    return {"folder": tmp_path_factory.mktemp("references")}


def _reference(references: dict[str, Any], layout: Layout) -> tuple[Any, float]:
    if layout.name not in references:
        run_dir = references["folder"] / layout.name.replace(" ", "_")
        began = time.monotonic()
        attempt = start(layout, run_dir, run_dir.with_suffix(".log"))
        assert attempt.wait() == 0, attempt.log.read_text()[-3000:]
        references[layout.name] = comparable(run_dir), time.monotonic() - began
    return references[layout.name]


def _round(seed: int, folder: Path, references: dict[str, Any]) -> None:
    """Disturb one run as `seed` says, and compare it with the undisturbed one of its layout."""
    draw = random.Random(seed)
    layout = draw.choice(LAYOUTS)
    expected, seconds = _reference(references, layout)
    run_dir, log = folder / "run", folder / "log"
    history = [f"seed {seed}, {layout.name}"]
    for _ in range(draw.randint(1, MOST_FAULTS)):
        if draw.random() < 0.5:
            fault = fault_inside(draw, layout)
            attempt = start(layout, run_dir, log, [fault])
            history.append(f"inside: {fault}")
        else:
            attempt = start(layout, run_dir, log)
            history.append("outside: " + disturb_outside(draw, attempt, seconds))
        history.append(f"  exit {attempt.wait()}")
        if is_done(run_dir):
            break
        if draw.random() < 0.3:
            history.append("damage: " + damage(draw, run_dir))
    if not is_done(run_dir):
        attempt = start(layout, run_dir, log)
        history.append(f"undisturbed: exit {attempt.wait()}")
    print(*history, sep="\n")
    told = "\n".join(history)
    assert is_done(run_dir), f"{told}\n{log.read_text(errors='replace')[-4000:]}"
    got = comparable(run_dir)
    assert got[0] == expected[0], f"{told}\nthe weights differ"
    assert got[1] == expected[1], f"{told}\nthe metrics differ"
    left = [path.name for path in run_dir.rglob("*.partial")]
    assert not left, f"{told}\nleft behind: {left}"


def test_every_disturbed_run_ends_as_the_undisturbed_one(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    references: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rounds go on until the time is over, and there is at least one; the seed of each is printed."""
    seconds = 60.0 * request.config.getoption("--chaos-minutes")
    seed, end, rounds = request.config.getoption("--chaos-seed"), time.monotonic() + seconds, 0
    while rounds == 0 or time.monotonic() < end:
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        with capsys.disabled():
            _round(seed, folder, references)
        shutil.rmtree(folder)
        seed, rounds = seed + 1, rounds + 1
