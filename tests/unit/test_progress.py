"""StepProgress: one object tells status file, watchdog, GPU sampler and bar, and times the phases."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest

from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.observability.nvml import GpuSampler
from rlsc_mcore.parallel.watchdog import SLOW_PHASES, Watchdog
from rlsc_mcore.run.status import Phase, RunStatus
from rlsc_mcore.training.faults import REMEDIES
from rlsc_mcore.training.progress import StepProgress


class Sampler(GpuSampler):
    """Keeps the phases that it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.heard: list[str | None] = []

    def enter(self, phase: str | None) -> None:
        self.heard.append(phase)


class Bars(Reporter):
    """Keeps how far each bar came."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.amounts: list[list[int]] = []

    @contextmanager
    def bar(self, description: str, total: int = 0, *, tokens_each: float = 0.0) -> Any:
        bar = type("Bar", (), {"advance": lambda self, amount, tokens: amounts.append(amount)})()
        amounts: list[int] = []
        self.amounts.append(amounts)
        yield bar


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[StepProgress]:
    watchdog = Watchdog(0, 1, hang_after_s=60.0, end=lambda message: None)
    status = RunStatus(tmp_path, 10, enabled=True)
    waited: list[int] = []
    made = StepProgress(status, watchdog, Bars(), Sampler(), lambda: waited.append(1))
    made.waited = waited  # type: ignore[attr-defined]
    yield made
    watchdog.close()  # an open one would end this process, and with it all later tests


def test_the_seconds_of_a_step_s_phases_add_up(
    progress: StepProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr("rlsc_mcore.training.progress.perf_counter", lambda: next(clock))
    for name in ("train", "swap", "train"):
        with progress.phase(name):  # type: ignore[arg-type]
            pass
    assert progress.seconds == {"train": 2.25, "swap": 1.5}
    assert len(progress.waited) == 3  # type: ignore[attr-defined]  # the clock stops after the device has
    assert progress.gpu.heard == ["train", None, "swap", None, "train", None]  # type: ignore[attr-defined]
    progress.begin_step(1)
    assert progress.seconds == {}


def test_everybody_hears_of_phase_step_and_progress(progress: StepProgress, tmp_path: Path) -> None:
    def written() -> Any:
        status = json.loads((tmp_path / "status.json").read_text())
        return status["phase"], status["steps_done"]

    watchdog, status = progress._watchdog, progress._status
    progress.begin_step(3)
    assert written() == (watchdog.phase, watchdog.steps_done) == ("rollout", 3)
    with progress.phase("rollout"), progress.bar("sampling", 100) as bar:
        watchdog._progress = 0.0
        bar.advance(7)
        assert watchdog._progress > 0.0 and status._facts["tokens"] == 7
    with progress.phase("train"), progress.bar("training", 2):
        progress.advance(1)
    assert status._facts["tokens"] == 0  # micro-batches are no tokens
    progress.advance(1)  # no bar is shown
    assert progress._report.amounts == [[7], [1]]  # type: ignore[attr-defined]
    progress.enter("save", 4)
    assert written() == (watchdog.phase, watchdog.steps_done) == ("save", 4)


def test_a_phase_that_goes_on_is_entered_once(progress: StepProgress) -> None:
    entered: list[tuple[str, int]] = []
    progress._status.enter = lambda *place: entered.append(place)  # type: ignore[method-assign]
    for _ in range(2):
        with progress.phase("swap"):
            pass
    progress.enter("evaluate", 1)
    progress.enter("evaluate", 1)
    assert entered == [("swap", 0), ("evaluate", 1)]


def test_tables_by_phase_use_the_names_of_phases() -> None:
    assert {*REMEDIES, *SLOW_PHASES} <= set(get_args(Phase))
