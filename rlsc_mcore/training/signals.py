"""Stop signals: remembered, and acted upon where the run can be saved."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsc_mcore.parallel.groups import Groups

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ENGINE_STEPS_BETWEEN_AGREEMENTS = 8  # a fraction of a second of decoding
SECONDS_BETWEEN_LOOKS = 0.5  # one request to the store takes about 0.1 ms
_polls = itertools.count()


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGUSR1 or SIGUSR2; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch the stop signals inside the block; the previous handlers come back after it."""
        previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


class AbortPoll:
    """Asked before every engine step of one phase: shall this rank leave the engine? Made on every rank when the phase begins.

    One rank's signal takes all ranks out, within a second or two: it is left in the store that the ranks met at, where the others
    look for it. The ranks of one engine run in lockstep and must leave at the same step: they agree every few calls. Collective
    over the engine's ranks.
    """

    def __init__(self, stop: StopRequest, groups: "Groups") -> None:
        self._stop, self._groups = stop, groups
        self._calls, self._looked = 0, time.monotonic()
        self._is_heard = self._is_told = False
        # Every rank makes its polls in the same order; an elastic restart goes on with the store of before.
        self._key = f"rlsc_stop_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{next(_polls)}"

    def __call__(self) -> bool:
        if self._groups.engine_tp_size == 1:
            return self._anywhere()
        self._calls += 1
        if self._calls % ENGINE_STEPS_BETWEEN_AGREEMENTS:
            return False
        return self._groups.any_in_engine(self._anywhere())

    def _anywhere(self) -> bool:
        """Whether this rank was signalled, or another that has said so."""
        if self._groups.world_size == 1:
            return bool(self._stop)
        with contextlib.suppress(Exception):  # a store that is gone has no news; the watchdog tells whose end that is
            if self._stop and not self._is_told:
                self._groups.store().set(self._key, "1")
                self._is_told = True
            if not self._stop and not self._is_heard and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
                self._looked = time.monotonic()
                self._is_heard = bool(self._groups.store().check([self._key]))
        return bool(self._stop) or self._is_heard
