"""Record stop signals and act on them at points where the run can be saved.

Python runs signal handlers only in the main thread, between two instructions. A thread that reads the wake-up
pipe of the signals acts when the main thread cannot: on a second SIGINT while a library computes, and on a
stop signal while the ranks wait for each other at the start.
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
# Ranks receive a terminal's SIGINT from the terminal and again from the launcher: the two count as one.
SAME_REQUEST_S = 0.02
SAME_REQUEST_OF_LAUNCHER_S = 3.0
# Seconds that the main thread has to leave by itself before a thread ends the process.
INTERRUPT_GRACE_S = 5.0
START_GRACE_S, START_GRACE_OF_RANKS_S = 8.0, 20.0
INTERRUPTED_CODE = 128 + signal.SIGINT
_polls = itertools.count()


class Interrupted(KeyboardInterrupt):
    """A stop signal ends a command at once; `str` is the line that says what was kept."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number

    @property
    def code(self) -> int:
        """Return the exit code that shells use for this signal."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` at a stop signal inside the block, so that incomplete work is cleaned up.

    No effect outside the main thread. Signals that are ignored (nohup) stay ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handlers(interrupt, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield


class StopRequest:
    """Record SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; a second SIGINT interrupts at once.

    Before `begin` nothing is trained: if the main thread does not act on a stop signal within seconds, a
    thread ends the process.
    """

    def __init__(self, on_end: Callable[[str | None], None] = lambda signal_name: None) -> None:
        """Register `on_end`, which is called before a thread ends the process.

        It receives the signal's name, or None after a second SIGINT.
        """
        self.signal_name: str | None = None
        self.on_end = on_end
        self._first: float | None = None  # when the first signal came
        self._has_begun = self._is_interrupting = False
        self._left = threading.Event()  # the block of `listening` is over

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def code(self) -> int:
        """Return the exit code of a command that this request ended before it was complete."""
        return 128 + (signal.Signals[self.signal_name] if self.signal_name else signal.SIGTERM)

    def begin(self) -> None:
        """Mark the start of training: from now on a stop signal waits until the run is saved."""
        self._has_begun = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the stop signals inside the block and restore the previous handlers after it.

        SIGHUP stays ignored under nohup.
        """
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
            os.close(writer)  # ends the thread, which closes the reader

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
        with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
            print(text, flush=True)


class AbortPoll:
    """Decide before every engine step of one phase whether this rank leaves the engine.

    Collective over the engine's ranks. Every rank creates one when the phase begins. A signal on one rank
    stops all ranks within a second or two: the rank sets a key in the rendezvous store, which the others
    poll. The ranks of one engine run in lockstep and must leave at the same step, so they agree every few
    calls.
    """

    def __init__(self, stop: StopRequest, groups: "Groups") -> None:
        self._stop, self._groups = stop, groups
        self._calls, self._looked = 0, time.monotonic()
        self._is_heard = self._is_told = False
        # Every rank creates its polls in the same order. An elastic restart keeps the same store.
        self._key = f"rlsc_stop_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{next(_polls)}"

    def __call__(self) -> bool:
        if self._groups.engine_tp_size == 1:
            return self._anywhere()
        self._calls += 1
        if self._calls % ENGINE_STEPS_BETWEEN_AGREEMENTS:
            return False
        return self._groups.any_in_engine(self._anywhere())

    def _anywhere(self) -> bool:
        """Return whether this rank received a stop signal, or another rank reported one in the store."""
        if self._groups.world_size == 1:
            return bool(self._stop)
        with contextlib.suppress(
            Exception
        ):  # the store may already be closed; the watchdog reports that failure
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
