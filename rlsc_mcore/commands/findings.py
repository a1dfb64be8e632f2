"""Define a line of the `rlsc doctor` report, and import packages with their output suppressed.

Uses only the standard library.
"""

import contextlib
import importlib
import importlib.util
import io
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

Level = Literal["ok", "note", "warn", "error"]

REINSTALL = "bash launch/install.sh"


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
    """Return "cuda" if torch finds a GPU, else "cpu"."""
    torch, _ = import_quietly("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"
