"""The watchdog of a run with one process: it ends a hang with one line and exit code 1, and nothing else."""

import subprocess
import sys

PROGRAM = """
import threading, time
from rlsc_mcore.parallel.watchdog import Watchdog
watchdog = Watchdog(0, 1, hang_after_s=0.6, end=lambda message: print("end:", message, flush=True))
watchdog.enter("train", 3)
{rest}
"""


def run(rest: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(rest=rest)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_that_hangs_is_ended_with_one_line() -> None:
    done = run("threading.Event().wait(50)")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("rlsc: this process hangs: no progress for 1 s in phase train, 3 steps done, ")
    assert line.endswith("; it ends, the last checkpoint is whole: rlsc train --resume")
    assert done.stdout == f"end: {line.removeprefix('rlsc: ')}\n"


def test_a_process_that_makes_progress_is_left_alone() -> None:
    done = run("for _ in range(20):\n    time.sleep(0.1)\n    watchdog.progress()\nprint('done')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_slow_phase_has_more_time_and_a_closed_watchdog_ends_nothing() -> None:
    assert run("watchdog.enter('start-up', 0)\ntime.sleep(1.2)\nprint('done')").stdout == "done\n"
    assert run("watchdog.close()\ntime.sleep(1.5)\nprint('done')").stdout == "done\n"


def test_the_time_in_which_the_process_was_stopped_does_not_count() -> None:
    stop = "import os, signal, subprocess, sys\n"
    stop += (
        "again = 'import os, signal, sys, time; time.sleep(1.5); os.kill(int(sys.argv[1]), signal.SIGCONT)'\n"
    )
    stop += "subprocess.Popen([sys.executable, '-c', again, str(os.getpid())])\n"
    stop += "watchdog.progress()\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.3)\nprint('done')"
    done = run(stop)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
