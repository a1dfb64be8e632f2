"""Write the small files of a run atomically, and write and read JSON with numbers that are not finite."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOT_FINITE = "not_finite"  # key of a row: path -> nan, inf or -inf for each number that was written as null


def write_atomically(file: Path, text: str) -> None:
    """Write `text` as UTF-8 to a temporary file and rename it to `file`, so a reader never sees a partial
    file.

    A lone surrogate, which a sampled answer can contain, is written as an escape.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return a copy of `value` with None instead of each number that is not finite: JSON has no such
    numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return `value` as standard JSON; numbers that are not finite become null."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def row_to_json(row: Mapping[str, Any]) -> str:
    """Return a row as JSON that `row_from_json` restores exactly.

    Numbers that are not finite become null and are listed under `not_finite`.
    """
    lost = {"/".join(map(str, path)): repr(value) for path, value in _not_finite(row)}
    return to_json({**row, **({NOT_FINITE: lost} if lost else {})})


def row_from_json(line: str | bytes) -> Any:
    """Parse a line written by `row_to_json`; raises ValueError if it is not JSON."""
    row = json.loads(line)
    for path, value in (row.pop(NOT_FINITE, {}) if isinstance(row, dict) else {}).items():
        *parents, name = path.split("/")
        holder = row
        for parent in parents:
            holder = holder[int(parent)] if isinstance(holder, list) else holder[parent]
        holder[int(name) if isinstance(holder, list) else name] = float(value)
    return row


def _not_finite(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _not_finite(entry, (*path, name))
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            yield from _not_finite(entry, (*path, position))
