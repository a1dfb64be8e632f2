"""Reward answers by a user's function, `file.py:function`, in worker processes with limits on time and
memory.

The function gets (response, question, answer), texts of which `answer` may be None, and returns a number. It
must depend on these arguments only. A call that exceeds a limit gives reward 0; any other error ends the run
with one line. The limits protect the run from mistakes; they do not make hostile code safe.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsc_mcore.config import ConfigError, RunError
from rlsc_mcore.grading import reward_worker
from rlsc_mcore.grading.symbolic import NUM_WORKERS
from rlsc_mcore.types import Question

CPU_SECONDS = 5.0  # limit per response
_WALL_SECONDS = 60.0  # per response: after this time the worker is considered hung, even on a busy machine
_WALL_SECONDS_TO_START = 300.0
_FIELD = "algorithm.reward_function"


class RewardWorker:
    """A process that calls the function; thread-safe. It is started at its first call, and again after a
    limit."""

    def __init__(
        self, path: str, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = _WALL_SECONDS
    ) -> None:
        """`path` is `file.py:function`; raises `ConfigError` if it is something else or names no file."""
        file, separator, self.name = path.rpartition(":")
        if not separator or not file.endswith(".py") or not self.name.isidentifier():
            raise ConfigError(f"{_FIELD}: expected file.py:function, got {path!r}")
        if not Path(file).is_file():
            raise ConfigError(f"{_FIELD}: no such file: {file}")
        self.path, self.file = path, str(Path(file).resolve())
        self.lock = threading.Lock()
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process unless it runs; raises `ConfigError` if it cannot load the function."""
        if self._process is not None:
            return
        command = [sys.executable, "-P", reward_worker.__file__, self.file, self.name, str(self._cpu_seconds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        loaded = self._read(_WALL_SECONDS_TO_START)
        if "ready" not in loaded:
            self.close()
            reason = loaded.get("error", "loading it ended the process (memory limit, or it exits)")
            raise ConfigError(f"{_FIELD}: {self.path}: {reason}")

    def reward(self, response: str, question: Question) -> float:
        """Return the reward of one response, 0 if a limit was exceeded; raises `RunError` if the function
        fails."""
        request = json.dumps([response, question.text, question.answer]).encode() + b"\n"
        with self.lock:
            self.start()
            assert self._process is not None and self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(request)
                self._process.stdin.flush()
            reply = self._read(self._wall_seconds)
            if not reply:  # the kernel ended the process, or it hangs
                self.close()
        if "error" in reply:
            raise RunError(
                f"{_FIELD}: {self.path} failed on an answer to question {question.index}: {reply['error']}; no "
                "checkpoint is changed"
            )
        return float(reply.get("reward", 0.0))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """Return the next reply; empty if the process ended or did not answer in time."""
        assert self._process is not None and self._process.stdout is not None
        descriptor, deadline, line = self._process.stdout.fileno(), time.monotonic() + timeout_s, b""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not line.endswith(b"\n") and (left_s := deadline - time.monotonic()) > 0:
            if poll.poll(1000 * left_s):
                part = os.read(descriptor, 65536)
                if not part:
                    return {}
                line += part
        return dict(json.loads(line)) if line.endswith(b"\n") else {}


@lru_cache(maxsize=1)
def _workers(path: str) -> tuple[RewardWorker, ...]:
    workers = tuple(RewardWorker(path) for _ in range(NUM_WORKERS))
    for worker in workers:
        atexit.register(worker.close)
    return workers


def check_reward_function(path: str) -> str:
    """Load the function in a worker and return its name with the contents of its file.

    Raises `ConfigError` in one line if that fails.
    """
    worker = _workers(path)[0]
    with worker.lock:
        worker.start()
    return f"{worker.name}\n{Path(worker.file).read_text(encoding='utf-8', errors='replace')}"


def function_rewards(path: str, responses: Sequence[str], question: Question) -> list[float]:
    """Return the reward of each response; equal responses are rewarded once. Thread-safe.

    Raises `RunError` if the function fails.
    """
    workers = _workers(path)
    rewards = {}
    for response in dict.fromkeys(responses):
        worker = next((worker for worker in workers if not worker.lock.locked()), workers[0])
        rewards[response] = worker.reward(response, question)
    return [rewards[response] for response in responses]
