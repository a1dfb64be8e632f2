"""`rlsc quickstart`: train the embedded model and compare it before and after."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import rlsc_mcore
from rlsc_mcore.commands.train import run_session
from rlsc_mcore.config import Config, ConfigError, RunError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.run.folder import delete_run_files
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import owned

REPOSITORY = Path(rlsc_mcore.__file__).parent.parent

MARKER = "quickstart.txt"
QUICKSTART_CONFIG = REPOSITORY / "configs" / "tiny_cpu.yaml"


def run_quickstart(arguments: Sequence[str]) -> int:
    """Run `rlsc quickstart`: train the embedded model, compare before and after, write `summary.json` into
    the run folder (default: runs/quickstart)."""
    parser = argparse.ArgumentParser(
        "rlsc quickstart", description="Train the embedded model by RLSC and compare it before and after."
    )
    parser.add_argument(
        "--run-dir",
        default="runs/quickstart",
        help="folder of the run; an earlier quickstart in it is replaced",
    )
    parser.add_argument(
        "--baseline",
        choices=["self_sft"],
        help="train this baseline too, from the same weights, and show its rows",
    )
    known, flags = parser.parse_known_args(arguments)
    start = perf_counter()
    run_dir = Path(known.run_dir)
    config = load_config(QUICKSTART_CONFIG, [*flags, "--run-dir", str(run_dir)])
    with _own_quickstart(run_dir):
        return _run(config, known.baseline, flags, start)


def _run(config: Config, baseline: str | None, flags: Sequence[str], start: float) -> int:
    run_dir = Path(config.run_dir)
    code = run_session(config, None, start=start, is_last=baseline is None)
    if code or baseline is None or not (run_dir / "summary.json").is_file():
        return code
    baseline_dir = run_dir / f"baseline_{baseline}"
    command = [sys.executable, "-m", "rlsc_mcore.cli", "train", "--config", str(QUICKSTART_CONFIG), *flags]
    command += ["--run-dir", str(baseline_dir), "--algorithm.objective", baseline]
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    from rlsc_mcore.evaluation.table import print_comparison

    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    summary["baselines"] = {
        baseline: json.loads((baseline_dir / "summary.json").read_text(encoding="utf-8"))["after"]
    }
    summary["seconds"]["total"] = round(perf_counter() - start + summary["seconds"]["install"], 1)
    write_atomically(run_dir / "summary.json", to_json(summary, indent=1) + "\n")
    print_comparison({"before": summary["before"], "rlsc": summary["after"], **summary["baselines"]})
    return 0


@contextmanager
def _own_quickstart(run_dir: Path) -> Iterator[None]:
    """Own `run_dir` inside the block and delete the files of an earlier quickstart from it.

    Files that a run does not write are kept. Raises ConfigError if the folder is not empty and has no
    quickstart marker.
    """
    marker = run_dir / MARKER
    if run_dir.exists() and not (run_dir.is_dir() and (marker.is_file() or not any(run_dir.iterdir()))):
        raise ConfigError(
            f"--run-dir {run_dir}: exists and was not made by a quickstart (no {MARKER} in it); it is left "
            "alone: choose another folder"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with owned(run_dir):
            delete_run_files(run_dir)
            for baseline in run_dir.glob("baseline_*"):
                if baseline.is_dir() and not baseline.is_symlink():
                    delete_run_files(baseline)
            marker.write_text(
                "This folder was made by rlsc quickstart, which replaces its run when it is called again.\n",
                encoding="utf-8",
            )
            yield
    except OSError as error:
        raise RunError(explain(error, run_dir) or f"{run_dir}: {error}") from error
