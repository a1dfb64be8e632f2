"""Symbolic equality by math-verify, in a process of its own.

An answer such as 10^{10^{10}} keeps Python inside one C call that neither a thread nor a signal handler can
leave, and the timeouts of math-verify work in the main thread only. So a worker does the algebra: the kernel
ends it when one comparison has used up its processor time, and the next comparison starts another. This is
the client; symbolic_worker.py is the program.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

from rlsc_mcore.grading import symbolic_worker
from rlsc_mcore.grading.symbolic_worker import EQUAL, READY

NUM_WORKERS = min(8, os.cpu_count() or 1)

_WALL_SECONDS_PER_COMPARISON = 60.0  # beyond it the worker is taken for hung, however busy the machine
_WALL_SECONDS_TO_START = 300.0


class SymbolicComparer:
    """Compares two LaTeX or plain expressions; safe to call from any thread and after a fork."""

    def __init__(self, cpu_seconds_per_comparison: float = 2.0) -> None:
        self._cpu_seconds = cpu_seconds_per_comparison
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget_worker)

    def are_equal(self, answer: str, gold: str) -> bool:
        """Say whether `answer` equals `gold` by the rules of math-verify; what cannot be parsed or takes too
        long does not.

        Raises RuntimeError where the worker cannot start (math-verify is missing or broken).
        """
        request = json.dumps([answer, gold]).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                reply, ended_by = self._ask(request)
                if reply or ended_by in (signal.SIGPROF, signal.SIGKILL):
                    return reply == EQUAL
                # Ended by something else, perhaps from outside: a fresh worker gets one more try.
            return False

    @property
    def is_free(self) -> bool:
        """Whether a comparison would begin at once; another thread may be faster."""
        return not self._lock.locked()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None where none runs."""
        return None if self._worker is None else self._worker.pid

    def close(self) -> None:
        """End the worker; the next comparison starts another."""
        with self._lock:
            if self._worker is not None:
                self._end_worker()

    def _forget_worker(self) -> None:
        # A forked child must not talk on its parent's pipes, nor wait for a lock that a thread of the parent
        # held.
        self._lock, self._worker = threading.Lock(), None

    def _ask(self, request: bytes) -> tuple[bytes, int]:
        """Return the reply, or b"" and the signal that ended the worker (0 where it was none)."""
        worker = self._worker or self._start_worker()
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(request)
            worker.stdin.flush()
        reply = _read_byte(worker, _WALL_SECONDS_PER_COMPARISON)
        return (reply, 0) if reply else (b"", self._end_worker())

    def _start_worker(self) -> subprocess.Popen[bytes]:
        # By path and with -P: neither the working directory nor the folder of this file can shadow a module
        # that the worker imports.
        command = [sys.executable, "-P", symbolic_worker.__file__, str(self._cpu_seconds)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        if _read_byte(self._worker, _WALL_SECONDS_TO_START) != READY:
            self._end_worker()
            raise RuntimeError(
                "grading needs math-verify, which does not load: see `python -c 'import math_verify'`"
            )
        return self._worker

    def _end_worker(self) -> int:
        worker, self._worker = self._worker, None
        assert worker is not None and worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=0.5)  # idle, or ended already: its status says why
        worker.kill()
        status = worker.wait()
        worker.stdout.close()
        return max(-status, 0)


comparers = tuple(
    SymbolicComparer() for _ in range(NUM_WORKERS)
)  # a worker starts at the first comparison that needs it
symbolic_comparer = comparers[0]
for _comparer in comparers:
    atexit.register(_comparer.close)


def compare_symbolically(answer: str, gold: str) -> bool:
    """Compare in the first worker that is free: called from several threads, several comparisons run at
    once."""
    free = next((comparer for comparer in comparers if comparer.is_free), symbolic_comparer)
    return free.are_equal(answer, gold)


def _read_byte(worker: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    assert worker.stdout is not None
    file_descriptor = worker.stdout.fileno()
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(file_descriptor, select.POLLIN)
    while (left_s := deadline - time.monotonic()) > 0:
        if poll.poll(1000 * left_s):
            return os.read(file_descriptor, 1)
    return b""
