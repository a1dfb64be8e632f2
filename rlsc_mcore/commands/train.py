"""`rlsc train`: start or resume a training run, and record how it ended."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rlsc_mcore.config import Config
from rlsc_mcore.config_file import parse_config
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.run.folder import SKIPPED_FOLDER, newest_checkpoint
from rlsc_mcore.run.limits import raise_file_limit
from rlsc_mcore.run.owner import is_main_rank, refuse_owned, release_all, released
from rlsc_mcore.run.resolve import TRAIN_HELP, resolve_training, split_options
from rlsc_mcore.run.scratch import remove_scratch
from rlsc_mcore.run.status import recorded_end, write_end
from rlsc_mcore.training.signals import StopRequest

if TYPE_CHECKING:
    from rlsc_mcore.training.session import Session


def run_train(arguments: Sequence[str]) -> int:
    """Run `rlsc train`: start or resume a run, or plan it with `--dry-run`; return the exit code."""
    only_plans = "--dry-run" in arguments
    planning = ("--gpus", "--gpu-memory-gib") if only_plans else ()
    options, flags = split_options(
        [a for a in arguments if a != "--dry-run"], ("--config", "--resume", *planning)
    )
    if {"-h", "--help"} & set(flags):
        parse_config(["--help"], description=TRAIN_HELP)
    if only_plans:
        from rlsc_mcore.commands.plan import dry_run

        gpus, memory = (options.pop(name, None) for name in ("--gpus", "--gpu-memory-gib"))
        return dry_run(resolve_training(options, flags)[0], gpus, memory)
    with StopRequest().listening() as stop:  # starts before the slow imports
        config, resume_from = resolve_training(options, flags)
        if "RANK" not in os.environ:  # with several ranks, the session checks this on all of them together
            refuse_owned(Path(config.run_dir))
        return run_session(config, resume_from, stop)


def run_session(
    config: Config,
    resume_from: Path | None,
    stop: StopRequest | None = None,
    *,
    start: float | None = None,
    is_last: bool = True,
) -> int:
    """Train until the run ends or is stopped, and record the end in the run's status; return the exit
    code."""
    start = perf_counter() if start is None else start
    with (
        contextlib.nullcontext(stop) if stop is not None else StopRequest().listening() as stop,
        released(Path(config.run_dir)),
        recorded_end(Path(config.run_dir)),
    ):
        stop.on_end = lambda signal_name: _record_hard_end(Path(config.run_dir), signal_name)
        raise_file_limit()
        from rlsc_mcore.rollout.engine import GenerationInterrupted
        from rlsc_mcore.training.announce import announce
        from rlsc_mcore.training.faults import reported
        from rlsc_mcore.training.loop import train
        from rlsc_mcore.training.session import Session
        from rlsc_mcore.training.stop_rules import skipped_steps

        with reported():
            try:
                session = Session(config, stop, resume_from=resume_from)
            except GenerationInterrupted:
                return _stopped(config, stop, "before anything was trained")
            announce(session, resume_from)
            result = train(session)
            if result is None:
                session.close()
                return _stopped(config, stop, "and saved")
            _finish(config, session, result, start=start, is_last=is_last)
            session.close()
            if session.groups.is_main:
                write_end(
                    Path(config.run_dir),
                    "done",
                    steps_done=result["steps"],
                    skipped_steps=len(skipped_steps(session.metrics.rows)),
                )
    return 0


def _record_hard_end(run_dir: Path, signal_name: str | None) -> None:
    """Record a stop that the main thread did not handle; runs in another thread right before the process
    ends."""
    if signal_name is None:
        write_end(run_dir, "crash", message="interrupted by a second SIGINT")
    elif is_main_rank():
        write_end(run_dir, "stopped", signal=signal_name)
    release_all()
    remove_scratch()


def _stopped(config: Config, stop: StopRequest, what: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        has_checkpoint = newest_checkpoint(Path(config.run_dir)) is not None
        how = (
            f"go on with: rlsc train --resume {config.run_dir}"
            if has_checkpoint
            else "the same command starts it again"
        )
        print(f"stopped by {stop.signal_name or 'another rank'} {what}; {how}", flush=True)
        write_end(Path(config.run_dir), "stopped", signal=stop.signal_name)
    return 0


def _finish(
    config: Config, session: "Session", result: dict[str, Any], *, start: float, is_last: bool
) -> None:
    """Export the weights, compare the engine's weights with the export, and write `summary.json`."""
    from rlsc_mcore.evaluation.table import print_comparison
    from rlsc_mcore.training.announce import versions
    from rlsc_mcore.training.stop_rules import skipped_steps

    skipped = skipped_steps(session.metrics.rows)
    compared = session.export(Path(config.run_dir) / "export")
    install = float(os.environ.get("RLSC_INSTALL_SECONDS", "0"))
    summary: dict[str, Any] = {
        "before": result["before"],
        "after": result["after"],
        "steps": result["steps"],
        "stopped_on": result["stopped_on"],
        "skipped_steps": len(skipped),
        # export() raises if a weight differs
        "engine_equals_export": compared > 0 if session.has_engine else None,
        "engine_parameters_compared": compared,
        "seconds": {
            "install": round(install, 1),
            "train": round(result["train_seconds"], 1),
            "total": round(perf_counter() - start + install, 1),
        },
        "versions": versions(),
    }
    if session.groups.is_main:
        write_atomically(Path(config.run_dir) / "summary.json", to_json(summary, indent=1) + "\n")
        if is_last and result["before"] is not None:
            print_comparison({"before": result["before"], "after": result["after"]})
        session.report.line(f"run: {config.run_dir}  model: {config.run_dir}/export")
        if skipped:
            session.report.warn(
                f"{len(skipped)} of {result['steps']} steps changed nothing: their loss or gradient was not "
                "finite (steps "
                f"{', '.join(str(step + 1) for step in skipped[:10])}{', ...' if len(skipped) > 10 else ''}; "
                "batches in "
                f"{config.run_dir}/{SKIPPED_FOLDER}): lower optimizer.lr, or look for the answers that break "
                "it"
            )
