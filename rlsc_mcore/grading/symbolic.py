"""Compare expressions symbolically by math-verify in worker processes.

An answer such as 10^{10^{10}} keeps Python in one C call that neither a thread nor a signal handler can
interrupt, and the timeouts of math-verify work only in the main thread. So a worker process compares the
expressions. The kernel ends the worker if a comparison exceeds its CPU time, and the next comparison starts a
new worker. This module is the client; symbolic_worker.py is the worker.
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

_WALL_SECONDS_PER_COMPARISON = 60.0  # after this time the worker is considered hung, even on a busy machine
_WALL_SECONDS_TO_START = 300.0


class SymbolicComparer:
    """Compare two LaTeX or plain expressions in a worker process; thread-safe and fork-safe."""

    def __init__(self, cpu_seconds_per_comparison: float = 2.0) -> None:
        self._cpu_seconds = cpu_seconds_per_comparison
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget_worker)

    def are_equal(self, answer: str, gold: str) -> bool:
        """Return whether math-verify finds `answer` and `gold` equal; False if it cannot parse them or takes
        too long.

        Raises RuntimeError if the worker cannot start (math-verify is missing or broken).
        """
        request = json.dumps([answer, gold]).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                reply, ended_by = self._ask(request)
                if reply or ended_by in (signal.SIGPROF, signal.SIGKILL):
                    return reply == EQUAL
                # The worker ended for another reason: try once more with a new worker.
            return False

    @property
    def is_free(self) -> bool:
        """Return whether no comparison is running; another thread can start one at any time."""
        return not self._lock.locked()

    @property
    def worker_pid(self) -> int | None:
        """Return the process id of the worker, or None if there is no worker."""
        return None if self._worker is None else self._worker.pid

    def close(self) -> None:
        """End the worker; the next comparison starts a new one."""
        with self._lock:
            if self._worker is not None:
                self._end_worker()

    def _forget_worker(self) -> None:
        # A forked child must not use the pipes of its parent, nor wait for a lock that was held at the fork.
        self._lock, self._worker = threading.Lock(), None

    def _ask(self, request: bytes) -> tuple[bytes, int]:
        """Return (reply, 0), or b"" and the signal that ended the worker (0 if it exited)."""
        worker = self._worker or self._start_worker()
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(request)
            worker.stdin.flush()
        reply = _read_byte(worker, _WALL_SECONDS_PER_COMPARISON)
        return (reply, 0) if reply else (b"", self._end_worker())

    def _start_worker(self) -> subprocess.Popen[bytes]:
        # Start the file by its path and with -P, so that neither the working directory nor the folder of this
        # file can shadow a module that the worker imports.
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
            worker.wait(timeout=0.5)  # keeps the exit status of a worker that has ended or is idle
        worker.kill()
        status = worker.wait()
        worker.stdout.close()
        return max(-status, 0)


comparers = tuple(
    SymbolicComparer() for _ in range(NUM_WORKERS)
)  # each starts its worker at its first comparison
symbolic_comparer = comparers[0]
for _comparer in comparers:
    atexit.register(_comparer.close)


def compare_symbolically(answer: str, gold: str) -> bool:
    """Compare with the first free comparer, so that calls from several threads run in parallel."""
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
