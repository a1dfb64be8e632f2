"""Keep a run alive if its output cannot be written: the terminal is closed, or the disk of a redirected
output is full. Imports no torch."""

import os
import sys
from typing import Any


def survive_a_lost_terminal() -> None:
    """Ignore failed writes to standard output and error; replaces `sys.stdout` and `sys.stderr`.

    After the first failed write the file descriptor points to /dev/null, so the output of libraries does not
    fail either.
    """
    if not isinstance(sys.stdout, _Surviving):
        sys.stdout = _Surviving(sys.stdout, 1)
    if not isinstance(sys.stderr, _Surviving):
        sys.stderr = _Surviving(sys.stderr, 2)


class _Surviving:
    """A text stream whose writes never raise OSError; every other attribute is that of the wrapped stream."""

    def __init__(self, stream: Any, descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor

    def write(self, text: str) -> int:
        """Write `text`; characters that the terminal's encoding lacks are written as escapes."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush; after a failure the output goes to /dev/null."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._descriptor)
            os.close(null)
        except OSError:  # no file descriptor is left for /dev/null
            return
