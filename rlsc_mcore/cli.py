"""The command line: `rlsc COMMAND`; `python -m rlsc_mcore.cli` is the same.

Exit codes: 0 done or stopped on request and saved, 1 failed, 2 bad input.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from rlsc_mcore.commands.table import find_command, usage
from rlsc_mcore.config import CollectiveRunError, ConfigError, RunError


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
    try:
        sys.exit(_run(name, rest))
    except ConfigError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"rlsc {name}: {error}", file=sys.stderr)
        _leave(2)
    except RunError as error:
        if not isinstance(error, CollectiveRunError) or int(os.environ.get("RANK", "0")) == 0:
            print(f"rlsc {name}: {error}", file=sys.stderr)
        _leave(1)
    except Exception:
        traceback.print_exc()
        _leave(1)


def _run(name: str, arguments: list[str]) -> int:
    command = find_command(name)
    if command.uses_engine:
        from rlsc_mcore.observability.console import quiet_libraries

        quiet_libraries()
    code = command.load()(arguments)
    return _leave(code) if command.uses_engine else code


def _leave(code: int) -> int:
    """End the process at once when an engine lives in it: its threads and process groups have nothing left to say."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "vllm" in sys.modules:
        import torch.distributed as dist

        if code == 0 and dist.is_initialized():  # after a failure the other ranks would be waited for
            dist.destroy_process_group()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
