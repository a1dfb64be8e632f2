"""`rlsc quickstart`: train the embedded model and compare it before and after."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from rlsc_mcore.commands.report import run_report
from rlsc_mcore.commands.train import run_session
from rlsc_mcore.config import Config, ConfigError, RunError
from rlsc_mcore.config_file import load_config, shipped_name
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.run.folder import delete_run_files
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.owner import owned
from rlsc_mcore.shipped import shipped_folder

MARKER = "quickstart.txt"
THREE_MODES = "three_modes"  # folder of the second run in that of the first, and key of its scores
QUICKSTART_CONFIG = shipped_folder("configs") / "tiny_cpu.yaml"
THREE_MODES_CONFIG = shipped_folder("configs") / "three_modes_cpu.yaml"


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
    parser.add_argument(
        "--first-only",
        action="store_true",
        help="leave out the second table, of embedded:three_modes; options of rlsc train leave it out too",
    )
    known, flags = parser.parse_known_args(arguments)
    start = perf_counter()
    run_dir = Path(known.run_dir)
    config = load_config(QUICKSTART_CONFIG, [*flags, "--run-dir", str(run_dir)])
    with _own_quickstart(run_dir):
        code = _run(config, known.baseline, flags, start)
        if code == 0 and not flags and not known.first_only and (run_dir / "summary.json").is_file():
            code = _run_three_modes(run_dir)
    if code == 0 and (run_dir / "summary.json").is_file():
        _print_end(run_dir)
    return code


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


def _run_three_modes(run_dir: Path) -> int:
    """Train `embedded:three_modes` in RUN/three_modes, with its output in RUN/three_modes.log, and print
    accuracy by author; returns 0. Raises RunError if the training fails."""
    from rlsc_mcore.assets import THREE_MODES_AUTHORS
    from rlsc_mcore.experiments.families import print_groups, scores_by_group

    folder, log = run_dir / THREE_MODES, run_dir / f"{THREE_MODES}.log"
    print(
        "training embedded:three_modes, on which confidence helps, misleads and fails (docs/three_modes.md); "
        f"log: {log}",
        flush=True,
    )
    command = [sys.executable, "-m", "rlsc_mcore.cli", "train", "--config", str(THREE_MODES_CONFIG)]
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            [*command, "--run-dir", str(folder)], stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RunError(f"{folder}: the training ended with exit code {code}: {' '.join(last)}; see {log}")
    scores = scores_by_group(
        folder, THREE_MODES_AUTHORS, load_config(THREE_MODES_CONFIG).evaluation.temperatures
    )
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    write_atomically(run_dir / "summary.json", to_json(summary | {THREE_MODES: scores}, indent=1) + "\n")
    print_groups(scores)
    return 0


def _print_end(run_dir: Path) -> None:
    """Write the report of the run, and print its path and the next three commands."""
    run_report([str(run_dir)])
    print(
        f"""next:
  rlsc chat {run_dir}
  rlsc train --config {shipped_name(QUICKSTART_CONFIG)} --run-dir runs/mine --algorithm.alpha 0.01
  rlsc eval --model {run_dir} --data my_questions.jsonl""",
        flush=True,
    )


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
            for baseline in (*run_dir.glob("baseline_*"), run_dir / THREE_MODES):
                if baseline.is_dir() and not baseline.is_symlink():
                    delete_run_files(baseline)
            marker.write_text(
                "This folder was made by rlsc quickstart, which replaces its run when it is called again.\n",
                encoding="utf-8",
            )
            yield
    except OSError as error:
        raise RunError(explain(error, run_dir) or f"{run_dir}: {error}") from error
