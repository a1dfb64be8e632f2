"""Run untrusted template code with limits on time, memory and output. Imports no torch."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlsc_mcore.config import ConfigError, one_line

SECONDS = 5.0  # limit per prompt
MORE_MEMORY_BYTES = 1 << 30  # in addition to the memory that the process has mapped
LONGEST_TEXT = 4_000_000  # limit of characters per prompt


class _TookTooLong(BaseException):
    """Raised by the timer. A BaseException, so that `except Exception` in a library does not catch it."""


@contextmanager
def foreign_code(name: str) -> Iterator[None]:
    """Limit the time and memory of the block, and convert every error in it to a `ConfigError` that names the
    template `name`.

    The time limit uses a timer of the main thread; other threads have no time limit. Mutates the timer and
    the address-space limit until the block ends.
    """
    try:
        with _limited_memory(), _limited_time():
            yield
    except ConfigError:
        raise
    except _TookTooLong:
        raise ConfigError(
            f"data.template: {name} did not end within {SECONDS:.0f} s for one question; use another template"
        ) from None
    except MemoryError:
        more = MORE_MEMORY_BYTES >> 30
        raise ConfigError(
            f"data.template: {name} asks for more than {more} GiB of memory for one question; use another "
            "template"
        ) from None
    except RecursionError:
        raise ConfigError(f"data.template: {name} calls itself without end; use another template") from None
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(
            f"data.template: {name} failed ({type(error).__name__}: {reason}); use another template"
        ) from None


def check_length(name: str, text: str) -> str:
    """Return `text`; raises `ConfigError` if it is longer than LONGEST_TEXT."""
    if len(text) > LONGEST_TEXT:
        raise ConfigError(
            f"data.template: {name} makes {len(text)} characters of one question, at most {LONGEST_TEXT} are "
            "allowed"
        )
    return text


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    handler = signal.signal(signal.SIGALRM, end)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # restore the timer that was active before
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - start)), interval)


@contextmanager
def _limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            limit = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MORE_MEMORY_BYTES
    except OSError:  # no /proc
        yield
        return
    for bound in (soft, hard):
        limit = limit if bound == resource.RLIM_INFINITY else min(limit, bound)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
