"""Report the phase and the progress of a run to everything that follows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rlsc_mcore.observability.console import NO_BAR, ProgressBar, Reporter
from rlsc_mcore.observability.nvml import GpuSampler
from rlsc_mcore.parallel.watchdog import Watchdog
from rlsc_mcore.run.status import Phase, RunStatus


class StepProgress:
    """Tell status file, watchdog, GPU sampler and progress bar what this rank does, and time the phases.

    `seconds` holds the wall-clock seconds of each phase of the current step, device work included. `gpu`
    holds the readings of the phases.
    """

    def __init__(
        self,
        status: RunStatus,
        watchdog: Watchdog,
        report: Reporter,
        gpu: GpuSampler,
        synchronize: Callable[[], None],
    ) -> None:
        """`synchronize` waits for the work of the device."""
        self.seconds: dict[Phase, float] = {}
        self.gpu = gpu
        self._status, self._watchdog, self._report = status, watchdog, report
        self._synchronize = synchronize
        self._entered: tuple[Phase, int] = ("start-up", 0)  # phase, steps done
        self._bar = NO_BAR

    def begin_step(self, step: int) -> None:
        """Begin the rollout of the step with index `step`: as many steps are done. Clears `seconds`."""
        self.seconds = {}
        self.enter("rollout", step)

    def enter(self, phase: Phase, steps_done: int | None = None) -> None:
        """Report that `phase` begins; `steps_done` is as before if it is not given.

        No effect if the phase already goes on. Raises `FolderLost` if the folder of the run is gone or
        belongs to another process.
        """
        entered = (phase, self._entered[1] if steps_done is None else steps_done)
        if entered != self._entered:
            self._entered = entered
            self._status.enter(*entered)
            self._watchdog.enter(*entered)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Enter a phase of the current step, and add the wall-clock time of the block to `seconds[name]`."""
        self.enter(name)
        start = perf_counter()
        self.gpu.enter(name)
        yield
        self._synchronize()
        self.gpu.enter(None)
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    @contextmanager
    def bar(self, description: str, total: int = 0, *, tokens_each: float = 0.0) -> Iterator[ProgressBar]:
        """Show the progress of the block as `Reporter.bar` does; `advance` of this object moves it."""
        with self._report.bar(description, total, tokens_each=tokens_each) as self._bar:
            yield self
        self._bar = NO_BAR

    def advance(self, amount: int, tokens: int | None = None) -> None:
        """Report progress within the current phase: in a rollout, `amount` sampled tokens."""
        self._watchdog.progress()
        if self._entered[0] == "rollout":
            self._status.count_tokens(amount)
        self._bar.advance(amount, tokens)
