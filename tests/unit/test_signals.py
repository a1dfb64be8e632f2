"""Stop signals in a process of their own: what each does, and when the process ends although its main thread
does not act."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

BEGIN = """
import os, signal, sys, time
from rlsc_mcore.training import signals
from rlsc_mcore.training.signals import StopRequest
signals.START_GRACE_S = signals.INTERRUPT_GRACE_S = 0.3
def polled(stop):
    print("ready", flush=True)
    limit = time.monotonic() + 20
    while not stop and time.monotonic() < limit:
        time.sleep(0.01)
    print("heard", stop.signal_name, flush=True)
"""
POLLS = (
    BEGIN
    + """
with StopRequest().listening() as stop:
    stop.begin()
    polled(stop)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""
)
DEAF = (
    BEGIN
    + """
def end(name): print("recorded", name, flush=True)
with StopRequest(end).listening() as stop:
    if sys.argv[1] == "begun":
        stop.begin()
    print("ready", flush=True)
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # a library call of minutes: no handler of Python runs before it returns
print("saved", flush=True)
"""
)


def hear_hangups() -> None:
    """Undo an ignored SIGHUP: a child inherits that of a suite that runs under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(program: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    options.setdefault("preexec_fn", hear_hangups)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    return process  # type: ignore[no-any-return]


def finish(
    process: "subprocess.Popen[str]", numbers: Sequence[int], apart_s: float = 0.15
) -> tuple[int, str, str]:
    for number in numbers:
        process.send_signal(number)
        time.sleep(apart_s)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_stop_signal_is_remembered(name: str) -> None:
    code, out, err = finish(start(POLLS, 0), [signal.Signals[name]])
    assert (code, out, err) == (0, f"heard {name}\nsaved\n", "")


def test_nohup_is_respected() -> None:
    process = start(POLLS, 0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    code, out, _ = finish(process, [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM])
    assert code == 0 and "heard SIGTERM" in out


@pytest.mark.parametrize("apart_s", [0.05, 0.3])
def test_a_second_interrupt_ends_python_code_at_once(apart_s: float) -> None:
    code, out, err = finish(start(POLLS, 30), [signal.SIGINT, signal.SIGINT], apart_s)
    assert code in (1, 130) and "\nsaved\n" not in out
    # Python code raises it, and the command line turns it into its message; a call that does not return is ended.
    assert "interrupted by a second SIGINT" in out + err


def test_a_second_interrupt_ends_a_library_call() -> None:
    begin = time.monotonic()
    code, out, err = finish(start(DEAF, "begun"), [signal.SIGINT, signal.SIGINT])
    assert code == 130 and time.monotonic() - begin < 20
    assert (
        out.splitlines()
        == ["recorded None", "interrupted by a second SIGINT; what was saved before is whole"]
        and not err
    )


def test_other_signals_twice_are_one_request() -> None:
    code, out, err = finish(
        start(POLLS, 0.5), [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    )
    assert (code, out, err) == (0, "heard SIGTERM\nsaved\n", "")


def test_a_launcher_s_copy_of_the_terminal_s_interrupt_is_the_same_request() -> None:
    process = start(POLLS, 1, env={**os.environ, "RANK": "1"})
    code, out, err = finish(process, [signal.SIGINT, signal.SIGINT])
    assert (code, out, err) == (0, "heard SIGINT\nsaved\n", "")


def test_a_stop_before_anything_was_trained_ends_a_start_that_hangs() -> None:
    code, out, err = finish(start(DEAF, "starting"), [signal.SIGTERM])
    assert (
        code == 0
        and out.splitlines() == ["recorded SIGTERM", "stopped by SIGTERM before anything was trained"]
        and not err
    )


CLEANS = """
import sys, time
from rlsc_mcore import cli
from rlsc_mcore.commands import table
def run(arguments):
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("cleaned", flush=True)
table.Command.load = lambda self: run
cli.main(["export", "x"])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_command_that_is_stopped_cleans_up_and_says_so_in_one_line(name: str) -> None:
    code, out, err = finish(start(CLEANS), [signal.Signals[name]])
    assert (code, out) == (128 + signal.Signals[name], "cleaned\n")
    assert err == f"rlsc export: stopped by {name} before it was complete\n"
