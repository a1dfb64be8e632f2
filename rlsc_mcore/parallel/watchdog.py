"""Detect dead and hung ranks. The first failure report ends all ranks and is printed once.

Each rank writes a heartbeat to the rendezvous store and reads the heartbeat of the next rank. The failure
report is stored there too. A heartbeat contains the activity of its rank (phase, steps done, collective),
so that the report can name the rank that the others wait for. torch's own timeouts do not know the activity,
and they expire much later.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlsc_mcore.config import ConfigError, one_line
from rlsc_mcore.run.status import Phase

DEAD_VARIABLE, DEFAULT_DEAD_AFTER_S = "RLSC_DEAD_AFTER_S", 60.0
BEATS_PER_LIMIT = 6
SLOW_PHASES: dict[Phase, float] = {"start-up": 4.0}  # compilation and graph capture report no progress
_REPORT = "report"
_OWN = ("rlsc_mcore", "megatron")


class Watchdog:
    """Track this rank's activity from a thread, and send heartbeats to the other ranks if there are any."""

    def __init__(
        self, rank: int, world_size: int, *, hang_after_s: float, end: Callable[[str], None]
    ) -> None:
        """Start the watchdog thread.

        `hang_after_s` is the longest time without progress. `end` receives the message before the process
        exits with code 1.
        """
        self.phase: Phase = "start-up"
        self.steps_done = 0
        self._rank, self._world_size, self._hang_after_s, self._end = rank, world_size, hang_after_s, end
        self._dead_after_s = seconds_from_environment(DEAD_VARIABLE, DEFAULT_DEAD_AFTER_S)
        self._interval_s = min(5.0, self._dead_after_s / BEATS_PER_LIMIT)
        self._main, self._progress = threading.main_thread().ident, time.monotonic()
        self._closed = threading.Event()
        self._lost_a_peer = False  # this rank waits for a failure report: it does not hang
        self._store: Any = None  # a torch store; torch does not export its type
        if world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            stores: Any = dist
            store = stores.TCPStore(
                address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False
            )
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = stores.PrefixStore(f"rlsc_watchdog_{attempt}", store)
        watch = self._watch if world_size > 1 else self._watch_alone
        threading.Thread(target=watch, name="watchdog", daemon=True).start()

    def enter(self, phase: Phase, steps_done: int) -> None:
        """Set the phase and the number of finished steps; counts as progress."""
        self.phase, self.steps_done = phase, steps_done
        self.progress()

    def progress(self) -> None:
        """Record progress within the current phase."""
        self._progress = time.monotonic()

    def fail(self, text: str) -> None:
        """Store this rank's failure and its reason; the other ranks end without own messages."""
        if self._store is not None and not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(Exception):  # the store may already be closed
                self._store.compare_set(
                    _REPORT, "", f"rank {self._rank} failed in phase {self._doing()}: {text}"
                )

    def wait_for_report(self) -> None:
        """Wait until the watchdog thread finds the lost rank that caused an error here.

        The thread then ends the process. Returns if no lost rank is found in that time.
        """
        if self._store is not None:
            self._lost_a_peer = True
            time.sleep(self._dead_after_s + 3 * self._interval_s)

    def close(self) -> None:
        """Stop watching; call it when no rank waits for another any more."""
        self._closed.set()

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        count, last, seen = 0, "", time.monotonic()
        # Send the first heartbeat at once, so that a rank that stops early is detected soon.
        while not self._closed.wait(self._interval_s if count else 0.0):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", json.dumps({"count": count, **self._beat()}))
                if self._store.check([_REPORT]):
                    self._exit(self._store.get(_REPORT).decode(), is_mine=False)
                if self._hangs() and not self._lost_a_peer:
                    self._judge(self._describe_hang())
                if self._store.check([f"beat/{neighbour}"]):
                    current = self._store.get(f"beat/{neighbour}").decode()
                    if current != last:
                        last, seen = current, time.monotonic()
                silent = time.monotonic() - seen
                if last and silent > self._dead_after_s:
                    self._judge(
                        f"rank {neighbour} is gone: silent for {silent:.0f} s, last in phase "
                        f"{_place(json.loads(last))}"
                    )
                if not last and silent > self._dead_after_s * SLOW_PHASES["start-up"]:
                    self._judge(
                        f"rank {neighbour} is gone: it has said nothing since rank {self._rank} started "
                        f"{silent:.0f} s ago"
                    )
            except Exception as error:
                # The store closes at the end of the run: wait to see whether this rank ends normally.
                if self._closed.wait(2 * self._interval_s):
                    return
                address = os.environ["MASTER_ADDR"]
                text = (
                    f"the ranks' meeting point ({address}, rank 0's process or torchrun's) is gone: "
                    f"{_with_type(error)}"
                )
                self._exit(f"{text}; rank {self._rank} was in phase {self._doing()}", is_mine=self._rank <= 1)

    def _watch_alone(self) -> None:
        """End the only process of a run, which no other rank can report, if it makes no progress.

        The time in which the whole process was stopped (SIGSTOP, Ctrl-Z) does not count.
        """
        interval_s = min(self._interval_s, self._hang_after_s / BEATS_PER_LIMIT)
        checked = time.monotonic()
        while not self._closed.wait(interval_s):
            checked, before = time.monotonic(), checked
            if checked - before > self._hang_after_s / 2:
                self.progress()
            if self._hangs():
                self._exit(f"this process hangs: {self._idleness(self._beat())}", is_mine=True)

    def _hangs(self) -> bool:
        limit = self._hang_after_s * SLOW_PHASES.get(self.phase, 1.0)
        return time.monotonic() - self._progress > limit

    def _judge(self, text: str) -> None:
        mine = f"{self._rank}: {text}"  # the rank makes equal reports of two ranks distinguishable
        self._exit(text, is_mine=self._store.compare_set(_REPORT, "", mine).decode() == mine)

    def _exit(self, text: str, *, is_mine: bool) -> None:
        if is_mine:
            ends = "every rank ends" if self._world_size > 1 else "it ends"
            message = f"{text}; {ends}, the last checkpoint is whole: rlsc train --resume"
            print(f"rlsc: {message}", file=sys.stderr, flush=True)
            self._end(message)
        if self._rank == 0 and self._world_size > 1:
            time.sleep(
                3 * self._interval_s
            )  # its process may host the store from which the others read the report
        os._exit(1)

    # ------------------------------------------------------------------ what a rank does

    def _beat(self) -> dict[str, Any]:
        collective, place = _where(self._main)
        idle = round(time.monotonic() - self._progress, 1)
        counts = collective_counts()
        return {
            "phase": self.phase,
            "steps_done": self.steps_done,
            "idle": idle,
            "collective": collective,
            "place": place,
            "counts": counts,
        }

    def _doing(self) -> str:
        return _place(self._beat())

    @staticmethod
    def _idleness(beat: dict[str, Any]) -> str:
        return f"no progress for {beat['idle']:.0f} s in phase {_place(beat)}"

    def _describe_hang(self) -> str:
        beats: dict[int, dict[str, Any]] = {self._rank: self._beat()}
        for rank in range(self._world_size):
            if rank != self._rank and self._store.check([f"beat/{rank}"]):
                beats[rank] = json.loads(self._store.get(f"beat/{rank}"))
        behind, ahead = behind_and_ahead({rank: beat["counts"] for rank, beat in beats.items()})
        waiting = {rank: beat for rank, beat in beats.items() if beat["collective"]}
        busy = {rank: beat for rank, beat in beats.items() if rank in behind} or {
            rank: beat for rank, beat in beats.items() if rank not in waiting
        }
        phases = "; ".join(f"rank {rank}: phase {_place(beat)}" for rank, beat in list(beats.items())[:8])
        if not busy:
            return f"no rank advances, each waits for the others: {phases}"
        if not behind and not waiting and dist.get_backend() == "nccl":
            # With NCCL a collective returns at once, so a host that waits for its result looks like a host
            # that computes.
            return f"no rank advances, and no rank is behind in a collective (see NCCL's flight recorder): {phases}"
        rank, beat = max(busy.items(), key=lambda item: item[1]["idle"])
        text = f"rank {rank} hangs: {self._idleness(beat)}"
        if waiting:
            other, its = next(iter(waiting.items()))
            text += f"; {len(waiting)} of {len(beats)} ranks wait for it, rank {other} in phase {_place(its)}"
        elif ahead:
            text += f"; {len(ahead)} of {len(beats)} ranks wait for it in a collective that it has not begun"
        return text


def collective_counts() -> dict[str, int]:
    """Return how many collectives this rank has started in each of its process groups, by group name.

    The name of a group is equal on all its ranks.
    """
    counts: dict[str, int] = {}
    names: dict[Any, str] = dict(dist.distributed_c10d._world.pg_names)
    for group, name in names.items():
        with contextlib.suppress(Exception):  # the group may be closing, or its library may have no counts
            if group.size() > 1:
                counts[name] = group._get_sequence_number_for_group()
    return counts


def behind_and_ahead(counts: Mapping[int, Mapping[str, int]]) -> tuple[set[int], set[int]]:
    """Return the ranks that others wait for and the ranks that wait, from their collective counts.

    The keys of `counts` are ranks. A rank that waits in one group is late in other groups because of that, so
    it is not among the first.
    """
    behind: set[int] = set()
    ahead: set[int] = set()
    for name in {name for by_group in counts.values() for name in by_group}:
        begun = {rank: by_group[name] for rank, by_group in counts.items() if name in by_group}
        most = max(begun.values())
        if min(begun.values()) < most:
            behind |= {rank for rank, number in begun.items() if number < most}
            ahead |= {rank for rank, number in begun.items() if number == most}
    return behind - ahead, ahead


def seconds_from_environment(name: str, default: float) -> float:
    """Read a number of seconds from an environment variable; raises ConfigError naming the variable."""
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name}: expected seconds, more than 0, got {text!r}")
    return seconds


def _place(beat: dict[str, Any]) -> str:
    where = (
        f"collective {beat['collective']}, called by {beat['place']}" if beat["collective"] else beat["place"]
    )
    return f"{beat['phase']}, {beat['steps_done']} steps done, {where}"


def _where(thread: int | None) -> tuple[str, str]:
    """Return the collective that a thread is in and the innermost function of this package around it.

    The first is "" if the thread is in no collective.
    """
    frame = sys._current_frames().get(thread or -1)
    collective = place = ""
    while frame is not None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
        if not collective and not place and module == "torch.distributed.distributed_c10d":
            collective = code.co_name
        if not place and module.startswith(_OWN) and module != __name__:
            place = f"{module}.{code.co_qualname if sys.version_info >= (3, 11) else code.co_name}"
        frame = frame.f_back
    return collective, place or "code outside of rlsc_mcore"


def _with_type(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
