"""Errors that end a command with one line, and the check of one field. Imports no torch."""

import math


class ConfigError(Exception):
    """Bad user input: one line that names the field, file or line. The command line prints it and exits with
    code 2."""


class RunError(RuntimeError):
    """A failure during a run: one line that says what happened and which results are safe. The command line
    exits with code 1."""


class CollectiveRunError(RunError):
    """A `RunError` that every rank raises with the same text. Only rank 0 prints it."""


def check(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise `ConfigError` unless `condition` holds and `value` is not infinite."""
    if not condition or value == math.inf:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def one_line(error: object, limit: int = 200) -> str:
    """Return the text of a library's error on one line of at most `limit` characters, for a message of
    ours."""
    return " ".join(str(error).split())[:limit]


def is_given(text: str) -> bool:
    """Return whether a required text is set. `null` in a YAML file arrives as the text `None`."""
    return bool(text.strip()) and text != "None"
