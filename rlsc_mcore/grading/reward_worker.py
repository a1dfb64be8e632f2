"""Run the worker process of reward_hook.py: call a user's reward function, one JSON line per response.

This file imports nothing from this package. The kernel ends the process if a call exceeds its CPU time;
memory is limited for the whole process.
"""

import importlib.util
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

MEMORY_LIMIT_BYTES = 2 << 30


def load_function(file: str, name: str) -> Callable[..., Any]:
    """Import `file` and return its function `name`; raises ValueError with a one-line reason."""
    specification = importlib.util.spec_from_file_location("reward_file", file)
    if specification is None or specification.loader is None:
        raise ValueError("expected a file that ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["reward_file"] = module
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        raise ValueError(f"importing it failed: {describe(error, file)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"it has no function {name!r}")
    return function  # type: ignore[no-any-return]


def describe(error: BaseException, file: str) -> str:
    """Return the type and text of an error in one line, with the last line of `file` that it passed
    through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(function: Callable[..., Any], request: list[Any], file: str) -> dict[str, Any]:
    """Return {"reward": number}, {"limit": reason} if memory ran out, or {"error": reason}."""
    try:
        value = function(*request)
    except (MemoryError, RecursionError) as error:
        return {"limit": type(error).__name__}
    except BaseException as error:
        return {"error": describe(error, file)}
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return {"reward": float(value)}
    return {"error": f"expected a finite number, got {repr(value)[:60]}"}


def serve(file: str, name: str, cpu_seconds: float) -> None:
    """Answer requests [response, question, answer] from standard input until it ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output of the function must not be read as a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client handles Ctrl-C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even inside a C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        function = load_function(file, name)
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    for request in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        value = answer(function, json.loads(request), file)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(value)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
