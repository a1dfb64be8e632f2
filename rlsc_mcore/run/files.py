"""How a run writes its small files: whole, or not at all."""

import contextlib
import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write `text` as UTF-8 beside `file` and rename it into place, so that a reader never meets half of it.

    A sampled answer may hold half of a surrogate pair; it is kept as its escape.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
