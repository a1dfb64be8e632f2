"""`rlsc export`: write a run's weights as a Hugging Face folder, and upload it."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore import __version__
from rlsc_mcore.commands.push import check_push, make_repository, push
from rlsc_mcore.run.folder import (
    ADAPTER_FOLDER,
    CHECKPOINT_HELP,
    EXPORT_FOLDER,
    LATEST,
    config_file,
    find_checkpoint,
)
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
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write only the LoRA adapter, in the format of the package peft (default folder: RUN/adapter)",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="also upload the folder to this model repository of the Hugging Face hub; a new one is private "
        "(needs HF_TOKEN or `hf auth login`)",
    )
    known = parser.parse_args(arguments)
    output = known.output or known.run / (ADAPTER_FOLDER if known.adapter else EXPORT_FOLDER)
    check_replaceable(output, field="--output", keep=(known.run,))  # before the slow imports
    is_main = is_main_rank()
    if known.push is not None:
        config_file(known.run)  # before a repository is created for a run that is not there
        find_checkpoint(known.run, known.checkpoint)
        check_push(known.push)
        if is_main:
            make_repository(known.push)
    with contextlib.ExitStack() as stack:
        is_inside = Path(os.path.realpath(known.run)) in Path(os.path.realpath(output)).parents
        if is_main and is_inside and known.run.is_dir():
            stack.enter_context(owned(known.run))  # a run that is still training writes there too
        from rlsc_mcore.training.export import export_run

        checkpoint = export_run(known.run, output, known.checkpoint, adapter=known.adapter)
    print(f"wrote {output} ({checkpoint.name})")
    if known.push is not None and is_main:
        message = f"{known.run.resolve().name}, {checkpoint.name}, by rlsc_mcore {__version__}"
        print(f"uploaded: {push(output, known.push, message)}")
    return 0
