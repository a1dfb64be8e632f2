"""Record the phase of a run and how it ended in `status.json` in its folder. Imports no torch.

The file is replaced atomically at each change. The launch script reads `state` to decide whether a job is
done, is restarted or stays stopped; `rlsc status` prints the other fields. The main rank can write its phase
while another rank reports a failure. So a failure is also written to `ending.json`, which only the first
failing rank can create. Every writer of `status.json` reads `ending.json` afterwards, so a later "running"
cannot overwrite a failure.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlsc_mcore.config import ConfigError, RunError, one_line
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import FolderInUse, FolderLost, Owner
from rlsc_mcore.run.printable import without_secrets

FILE, ENDING_FILE = "status.json", "ending.json"
# The launch script sets these variables. It checks the folder and reads the end of the run from `FILE`.
JOB_VARIABLE, ATTEMPT_VARIABLE = "SLURM_JOB_ID", "RLSC_ATTEMPT"
SECONDS_BETWEEN_COUNTS = 5.0
RESERVED_BYTES = 4096  # size of status.json: on a full disk it can be overwritten in place
# Everything that reports the activity of a run uses these names. The seconds of a step are recorded for rollout,
# pack, train and swap.
Phase = Literal["start-up", "evaluate", "rollout", "pack", "train", "swap", "save", "export"]
State = Literal["launching", "running", "stopped", "done", "config", "crash"]
FAILED: tuple[State, ...] = ("config", "crash")
ENDED: tuple[State, ...] = ("stopped", "done", *FAILED)


class RunStatus:
    """Write the status of the run on the main rank; other ranks write nothing.

    States: `launching` (the launch script runs its checks), `running`, `stopped` (on request, with a
    checkpoint), `done`, `config` (bad input), `crash`. Times are seconds since the epoch. A status that
    cannot be written does not end the run.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        *,
        enabled: bool,
        owner: Owner | None = None,
    ) -> None:
        """Write the first status. `owner` is checked at each new phase."""
        self._run_dir, self._enabled, self._owner = run_dir, enabled, owner
        self._facts: dict[str, Any] = {
            "state": "running",
            "phase": "start-up",
            "steps_done": 0,
            "num_steps": num_steps,
            "tokens": 0,
            **_place(),
            "started": round(time.time(), 1),
            "phase_since": round(time.time(), 1),
        }
        self._counted = 0.0
        if (
            enabled and not is_launched()
        ):  # with a launch script, the file is deleted before the ranks start, so no failure report is lost
            with contextlib.suppress(OSError):
                (run_dir / ENDING_FILE).unlink()
        self._write()

    def enter(self, phase: Phase, steps_done: int) -> None:
        """Record the start of a phase after `steps_done` finished steps.

        Raises `FolderLost` if the folder is gone or belongs to another process.
        """
        if self._owner is not None:
            self._owner.check()
        self._facts.update(phase=phase, steps_done=steps_done, tokens=0, phase_since=round(time.time(), 1))
        self._write()

    def count_tokens(self, tokens: int) -> None:
        """Add sampled tokens to the count of this phase, which is written every few seconds."""
        self._facts["tokens"] += tokens
        if time.monotonic() - self._counted > SECONDS_BETWEEN_COUNTS:
            self._write()

    def _write(self) -> None:
        self._counted = time.monotonic()
        if self._enabled:
            _publish(self._run_dir, self._facts)


def write_end(run_dir: Path, state: State, **facts: Any) -> None:
    """Record how the run ended; phase and steps done are kept.

    Only the first report of a crash or bad input is recorded. Nothing is written unless this run owns the
    folder.
    """
    last, place = read_status(run_dir) or {}, _place()
    is_ours = last.get("state") == "running" and (
        place["rank"] != 0 or (last.get("host"), last.get("pid")) == (place["host"], place["pid"])
    )
    if last.get("state") in FAILED or not (is_ours or is_launched()):
        return
    ending = {**last, **place, **facts, "state": state}
    if state in FAILED and not _is_first(run_dir / ENDING_FILE, ending):
        return
    _publish(run_dir, ending)


@contextmanager
def recorded_end(run_dir: Path) -> Iterator[None]:
    """Record bad input and crashes inside the block, then re-raise them."""
    try:
        yield
    except (FolderInUse, FolderLost):  # the status file belongs to another process
        raise
    except ConfigError as error:
        write_end(run_dir, "config", message=str(error))
        raise
    except KeyboardInterrupt as error:
        write_end(run_dir, "crash", message=str(error) or "interrupted")
        raise
    except BaseException as error:
        kind = (
            "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        )  # the message of a RunError needs no type name
        text = explain(error) or kind + str(error)
        write_end(run_dir, "crash", message=one_line(text, 500))
        raise


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Return the last status, or None if the file is missing or unreadable.

    Older versions wrote `steps_done` as `step`.
    """
    status = _read(run_dir / FILE)
    if status is not None and "step" in status:
        status.setdefault("steps_done", status.pop("step"))
    return status


def is_launched() -> bool:
    """Return whether the launch script, which checks that the run folder is free, started this process."""
    return ATTEMPT_VARIABLE in os.environ


def _place() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "rank": int(os.environ.get("RANK", "0")),
        "pid": os.getpid(),
        "job": os.environ.get(JOB_VARIABLE),
        "attempt": int(os.environ.get(ATTEMPT_VARIABLE, "0")),
    }


def _read(file: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _is_first(file: Path, ending: dict[str, Any]) -> bool:
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(_text(ending))
    except FileExistsError:
        return False
    except OSError:
        return True  # a status that cannot be written does not end the run
    return True


def _publish(run_dir: Path, facts: dict[str, Any]) -> None:
    _replace(run_dir / FILE, facts)
    ending = _read(
        run_dir / ENDING_FILE
    )  # None if its writer is not finished; that writer replaces the status afterwards
    if ending is not None and ending.get("state") != facts["state"]:
        _replace(run_dir / FILE, ending)


def _replace(file: Path, facts: dict[str, Any]) -> None:
    """Replace the status atomically, or in place if the disk has no space for a second file; never raises."""
    partial = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.partial")
    content = _text(facts).ljust(RESERVED_BYTES).encode()
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_WRONLY)  # no O_CREAT: a deleted status file is not created again
            try:
                os.pwrite(descriptor, content.ljust(os.fstat(descriptor).st_size), 0)
            finally:
                os.close(descriptor)


def _text(facts: dict[str, Any]) -> str:
    if isinstance(facts.get("message"), str):
        facts = {**facts, "message": without_secrets(facts["message"])}
    return json.dumps({**facts, "updated": round(time.time(), 1)}, indent=1) + "\n"
