"""`rlsc export`: write a run's weights as a Hugging Face folder."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.run.folder import CHECKPOINT_HELP, EXPORT_FOLDER, LATEST
from rlsc_mcore.run.made_here import check_replaceable
from rlsc_mcore.run.owner import is_main_rank, owned


def run_export(arguments: Sequence[str]) -> int:
    """Run `rlsc export`: write the weights of a checkpoint as a Hugging Face folder."""
    parser = argparse.ArgumentParser(
        "rlsc export", description="Write a run's weights as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export)")
    parser.add_argument("--checkpoint", default=LATEST, help=CHECKPOINT_HELP)
    known = parser.parse_args(arguments)
    output = known.output or known.run / EXPORT_FOLDER
    check_replaceable(output, field="--output", keep=(known.run,))  # before the slow imports
    with contextlib.ExitStack() as stack:
        is_main, is_inside = (
            is_main_rank(),
            Path(os.path.realpath(known.run)) in Path(os.path.realpath(output)).parents,
        )
        if is_main and is_inside and known.run.is_dir():
            stack.enter_context(owned(known.run))  # a run that is still training writes there too
        from rlsc_mcore.training.export import export_run

        checkpoint = export_run(known.run, output, known.checkpoint)
    print(f"wrote {output} ({checkpoint.name})")
    return 0
