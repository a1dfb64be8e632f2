"""Stop signals: remembered, and acted upon where the run can be saved.

Python runs signal handlers between two instructions of the main thread only. A thread that reads the signals'
wake-up pipe acts where the main thread cannot: a second SIGINT while a library computes, and a stop while the
ranks still wait for each other.
"""

import _thread
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsc_mcore.parallel.groups import Groups

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENGINE_STEPS_BETWEEN_AGREEMENTS = 8  # a fraction of a second of decoding
SECONDS_BETWEEN_LOOKS = 0.5  # one request to the store takes about 0.1 ms
# A launcher passes a terminal's SIGINT on to ranks that got it from the terminal already: the pair counts as
# one.
SAME_REQUEST_S = 0.02
SAME_REQUEST_OF_LAUNCHER_S = 3.0
# How long the main thread may take to leave by itself before the process is ended from beside it.
INTERRUPT_GRACE_S = 5.0
START_GRACE_S, START_GRACE_OF_RANKS_S = 8.0, 20.0
INTERRUPTED_CODE = 128 + signal.SIGINT
_polls = itertools.count()


class Interrupted(KeyboardInterrupt):
    """A stop signal that ends a command at once; `str` is the line that says what was kept."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells use for this signal."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` at a stop signal inside the block, so that what is half done is cleaned up.

    Without effect outside the main thread. Signals that are ignored (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handlers(interrupt, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; a second SIGINT interrupts at once.

    Until `begin`, nothing has been trained: a stop that the main thread does not act upon within seconds ends
    the process.
    """

    def __init__(self, on_end: Callable[[str | None], None] = lambda signal_name: None) -> None:
        """`on_end` records the end before the thread ends the process: the signal's name, or None when it was
        interrupted."""
        self.signal_name: str | None = None
        self.on_end = on_end
        self._first: float | None = None  # when the first signal came
        self._has_begun = self._is_interrupting = False
        self._left = threading.Event()  # the block of `listening` is over

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def code(self) -> int:
        """The exit code of a command that this request ended before it was complete."""
        return 128 + (signal.Signals[self.signal_name] if self.signal_name else signal.SIGTERM)

    def begin(self) -> None:
        """Say that from now on a stop must wait until the run is saved."""
        self._has_begun = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch the stop signals inside the block; the previous handlers come back after it. SIGHUP stays
        ignored under nohup."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._left.clear()
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True).start()
        try:
            with _handlers(self._remember, STOP_SIGNALS):
                yield self
        finally:
            self._left.set()
            signal.set_wakeup_fd(previous)
            os.close(writer)  # ends the thread, which closes its side

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._is_interrupting:
            raise Interrupted(signal.SIGINT, "interrupted by a second SIGINT; what was saved before is whole")
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name

    # ------------------------------------------------------------------ the thread

    def _watch(self, reader: int) -> None:
        try:
            while numbers := os.read(reader, 64):
                for number in numbers:
                    if number in STOP_SIGNALS and not self._is_interrupting:
                        self._arrived(number)
        finally:
            os.close(reader)

    def _arrived(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if not self._has_begun:
                threading.Thread(
                    target=self._end_start, args=(number,), name="stop before the start", daemon=True
                ).start()
            return
        same = SAME_REQUEST_OF_LAUNCHER_S if "RANK" in os.environ else SAME_REQUEST_S
        if number == signal.SIGINT and now - self._first > same:
            self._is_interrupting = True
            _thread.interrupt_main(signal.SIGINT)
            threading.Thread(target=self._end_interrupted, name="second interrupt", daemon=True).start()

    def _end_start(self, number: int) -> None:
        grace = START_GRACE_OF_RANKS_S if int(os.environ.get("WORLD_SIZE") or 1) > 1 else START_GRACE_S
        if self._left.wait(grace) or self._has_begun:
            return
        name = signal.Signals(number).name
        self.on_end(name)
        _say(f"stopped by {name} before anything was trained")
        os._exit(0)

    def _end_interrupted(self) -> None:
        if not self._left.wait(INTERRUPT_GRACE_S):
            self.on_end(None)
            _say("interrupted by a second SIGINT; what was saved before is whole")
            os._exit(INTERRUPTED_CODE)


@contextmanager
def _handlers(
    handler: Callable[[int, FrameType | None], None], numbers: tuple[signal.Signals, ...]
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [
        number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)


def _say(text: str) -> None:
    if int(os.environ.get("RANK") or 0) == 0:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            print(text, flush=True)


class AbortPoll:
    """Asked before every engine step of one phase: shall this rank leave the engine? Made on every rank when
    the phase begins.

    One rank's signal takes all ranks out, within a second or two: it is left in the store that the ranks met
    at, where the others look for it. The ranks of one engine run in lockstep and must leave at the same step:
    they agree every few calls. Collective over the engine's ranks.
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
        with contextlib.suppress(
            Exception
        ):  # a store that is gone has no news; the watchdog tells whose end that is
            if self._stop and not self._is_told:
                self._groups.store().set(self._key, "1")
                self._is_told = True
            if (
                not self._stop
                and not self._is_heard
                and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS
            ):
                self._looked = time.monotonic()
                self._is_heard = bool(self._groups.store().check([self._key]))
        return bool(self._stop) or self._is_heard
