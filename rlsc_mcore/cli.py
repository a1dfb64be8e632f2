"""The command line: `rlsc COMMAND`; `python -m rlsc_mcore.cli` is the same.

Exit codes: 0, the command finished, or a training run was stopped on request and saved; 1, failed; 2, bad
input; 128 + n, signal n ended the command early and its finished results are kept.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from rlsc_mcore.commands.table import find_command, usage
from rlsc_mcore.config import CollectiveRunError, ConfigError, RunError
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import is_main_rank, release_all
from rlsc_mcore.run.printable import printable, without_secrets
from rlsc_mcore.run.scratch import remove_scratch
from rlsc_mcore.run.terminal import survive_a_lost_terminal
from rlsc_mcore.training.signals import Interrupted, interruptible


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    from rlsc_mcore import __version__

    if arguments[0] in ("-V", "--version"):
        print(__version__)
        sys.exit(0)
    name, rest = arguments[0], arguments[1:]
    survive_a_lost_terminal()
    threading.excepthook = _tell_of_thread
    try:
        with interruptible():
            code = _run(name, rest)
    except ConfigError as error:
        if is_main_rank():
            _tell(name, error)
        code = 2
    except RunError as error:
        if not isinstance(error, CollectiveRunError) or is_main_rank():
            _tell(name, error)
        code = 1
    except KeyboardInterrupt as error:
        if is_main_rank():
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            _tell(name, str(error) or f"stopped by {signal.Signals(number).name} before it was complete")
        code = error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT
    except Exception as error:
        cause = explain(error)
        if cause is not None:
            _tell(name, cause)
        else:
            traceback.print_exc()
        code = 1
    _leave(code)


def _tell_of_thread(ending: threading.ExceptHookArgs) -> None:
    """Report an exception in a library's thread (TensorBoard's writer).

    An error of the operating system (disk, limits, memory) is one line on the main rank. Every other
    exception is printed with its traceback.
    """
    cause = explain(ending.exc_value) if ending.exc_value is not None else None
    if cause is None:
        threading.__excepthook__(ending)
    elif is_main_rank():
        _tell("background thread", cause)


def _tell(name: str, error: object) -> None:
    print(f"rlsc {name}: {printable(without_secrets(str(error)))}", file=sys.stderr)


def _run(name: str, arguments: list[str]) -> int:
    command = find_command(name)
    if command.uses_engine:
        from rlsc_mcore.observability.console import quiet_libraries

        quiet_libraries()
    return command.load()(arguments)


def _leave(code: int) -> NoReturn:
    """Exit the process with `code`.

    If vLLM is loaded, the process exits without waiting for the engine's threads.
    """
    release_all()
    remove_scratch()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "vllm" in sys.modules:
        import torch.distributed as dist

        if code == 0 and dist.is_initialized():  # after a failure this would wait for the other ranks
            dist.destroy_process_group()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
