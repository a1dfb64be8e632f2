"""Keep a run alive when what it prints cannot be written: a closed terminal, a full disk behind a
redirection. Imports no torch."""

import os
import sys
from typing import Any


def survive_a_lost_terminal() -> None:
    """Let the process's prints fail silently from the first failed write on; mutates `sys.stdout` and
    `sys.stderr`.

    The file descriptor then points to /dev/null, so that what libraries print does not fail either.
    """
    if not isinstance(sys.stdout, _Surviving):
        sys.stdout = _Surviving(sys.stdout, 1)
    if not isinstance(sys.stderr, _Surviving):
        sys.stderr = _Surviving(sys.stderr, 2)


class _Surviving:
    """A text stream whose writes never raise OSError; everything else is the stream's own."""

    def __init__(self, stream: Any, descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor

    def write(self, text: str) -> int:
        """Write `text`, with an escape for what the terminal's encoding lacks."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, or stop printing for good."""
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
        except OSError:  # no file descriptor left
            return
