"""Faults for a rank, by phase: on PYTHONPATH of a test's job, Python imports this file before anything else.

RLSC_TEST_FAULTS is a JSON list of {"phase", "do", and optionally "step", "rank", "attempt", "value",
"early"}: when a matching rank enters that phase (after `step` steps, in that attempt) it does this, with
"early" before it says so in status.json:

    wait       until this rank has been asked to stop
    hold       until the file `value` in the run folder is there
    exit       with code `value`
    kill       itself, with SIGKILL
    raise      an exception
    stop       itself, with SIGSTOP
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

IS_RANK = "rlsc_mcore.cli" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv
FAULTS = json.loads(os.environ.get("RLSC_TEST_FAULTS", "[]")) if IS_RANK else []


def inject(run_dir: Path, phase: str, step: int | None, *, early: bool) -> None:
    """Do what is asked for this phase."""
    here = {
        "phase": phase,
        "step": step,
        "rank": int(os.environ.get("RANK", "0")),
        "attempt": int(os.environ.get("RLSC_ATTEMPT", "0")),
    }
    for fault in FAULTS:
        if fault.get("early", False) != early or any(
            fault[name] != value for name, value in here.items() if name in fault
        ):
            continue
        if fault["do"] == "wait":
            while not asked:
                time.sleep(0.05)
        elif fault["do"] == "hold":
            while not (run_dir / fault["value"]).exists():
                time.sleep(0.05)
        elif fault["do"] == "exit":
            os._exit(fault["value"])
        elif fault["do"] == "raise":
            raise RuntimeError(f"injected in {phase}")
        else:
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault["do"]])


if FAULTS:
    from rlsc_mcore.run.status import RunStatus
    from rlsc_mcore.training.signals import StopRequest

    begin, enter, remember = RunStatus.__init__, RunStatus.enter, StopRequest._remember
    asked = []

    def remember_and_tell(self, number, frame):
        asked.append(number)
        remember(self, number, frame)

    def begin_and_inject(self, run_dir, *arguments, **options):
        self.run_dir_of_faults = run_dir
        begin(self, run_dir, *arguments, **options)
        inject(run_dir, "start-up", 0, early=False)

    def enter_and_inject(self, phase, steps_done):
        inject(self.run_dir_of_faults, phase, steps_done, early=True)
        enter(self, phase, steps_done)
        inject(self.run_dir_of_faults, phase, steps_done, early=False)

    RunStatus.__init__, RunStatus.enter, StopRequest._remember = (
        begin_and_inject,
        enter_and_inject,
        remember_and_tell,
    )
