"""`rlsc export`: write a run's weights as a Hugging Face folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.folder import CHECKPOINT_HELP, LATEST


def run_export(arguments: Sequence[str]) -> int:
    """`rlsc export`: write the weights of one of a run's checkpoints as a Hugging Face folder."""
    parser = argparse.ArgumentParser("rlsc export", description="Write a run's weights as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export)")
    parser.add_argument("--checkpoint", default=LATEST, help=CHECKPOINT_HELP)
    known = parser.parse_args(arguments)
    from rlsc_mcore.training.export import export_run

    output = known.output or known.run / "export"
    if output.exists() and not (output / "config.json").is_file():
        raise ConfigError(f"--output {output}: exists and is no model folder; choose another")
    checkpoint = export_run(known.run, output, known.checkpoint)
    print(f"wrote {output} ({checkpoint.name})")
    return 0
