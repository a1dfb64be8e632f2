"""`rlsc quickstart`: train the embedded model and compare it before and after."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import rlsc_mcore
from rlsc_mcore.commands.train import run_session
from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.run.files import write_atomically

REPOSITORY = Path(rlsc_mcore.__file__).parent.parent

QUICKSTART_CONFIG = REPOSITORY / "configs" / "tiny_cpu.yaml"


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
    code = run_session(config, None, start=start, is_last=known.baseline is None)
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


def _replace_earlier_quickstart(run_dir: Path) -> None:
    import shutil

    if not run_dir.exists():
        return
    file = run_dir / "config.yaml"
    if not file.is_file() or "embedded:tiny_qwen2" not in file.read_text(encoding="utf-8"):
        raise ConfigError(f"--run-dir {run_dir}: exists and is no earlier quickstart; choose another folder")
    shutil.rmtree(run_dir)
