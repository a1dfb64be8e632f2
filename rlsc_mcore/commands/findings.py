"""Define a line of the `rlsc doctor` report, and import packages with their output suppressed.

Imports only the standard library at its head, so that a broken installation can be described.
"""

import contextlib
import importlib
import importlib.util
import io
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rlsc_mcore.shipped import IS_CHECKOUT, shipped_folder

Level = Literal["ok", "note", "warn", "error"]


def _reinstall() -> str:
    """Return the command that installs the packages of this machine's default stack."""
    if IS_CHECKOUT:
        return "bash launch/install.sh"
    stack = "gpu" if Path("/dev/nvidia0").exists() else "cpu"
    pins = shipped_folder("launch") / f"requirements-{stack}.txt"
    return f"pip install -c {pins} torch && pip install --no-deps -r {pins}"


REINSTALL = _reinstall()


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is a command or a setting."""

    level: Level
    subject: str
    text: str
    fix: str = ""


def import_quietly(name: str) -> tuple[Any, str]:
    """Import a module with its output suppressed; return (module, ""), or (None, reason in one line)."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None, "not installed"
    noise = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except (
        Exception,
        SystemExit,
    ) as error:  # an incomplete package raises OSError, RuntimeError, AttributeError, ...
        return None, one_line(error)


def one_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def installed_version(distribution: str) -> str:
    """Return the version of a distribution, or "" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def device_type() -> Literal["cpu", "cuda"]:
    """Return "cuda" if torch imports and finds a GPU, else "cpu"."""
    backend, _ = import_quietly("rlsc_mcore.parallel.backend")
    return "cpu" if backend is None else backend.device_type()
