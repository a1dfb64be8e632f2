"""Write what a run leaves in its folder: the resolved configuration, the rollouts, a skipped batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.config_file import changed_fields, dump_config, load_config
from rlsc_mcore.data.packing import UniqueSequence
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.files import write_atomically
from rlsc_mcore.run.folder import CONFIG_FILE

if TYPE_CHECKING:
    from rlsc_mcore.parallel.groups import Groups
    from rlsc_mcore.types import Rollout

SKIPPED_FOLDER = "skipped"


def claim_run_folder(run_dir: Path, config: Config, groups: "Groups", *, resuming: bool) -> None:
    """Refuse a folder of another run, create ours and write the resolved configuration; collective over the world.

    Raises `ConfigError`: before anything is written where the folder holds another configuration (unless `resuming`), and on
    every rank where it cannot be written.
    """
    file = run_dir / CONFIG_FILE
    if file.is_file() and not resuming:
        changes = changed_fields(load_config(file), config)
        if changes:
            raise ConfigError(f"run_dir: {run_dir} holds a run with another configuration ({'; '.join(changes)}); choose another folder")
    groups.barrier()
    failure = ""
    if groups.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(file, dump_config(config))
        except OSError as error:
            failure = f": {error.strerror}"
    if groups.any(bool(failure)):
        raise ConfigError(f"run_dir: {run_dir} is not writable{failure}")


def write_rollouts(run_dir: Path, step: int, rollouts: "Sequence[Rollout]", groups: "Groups") -> None:
    """Write a step's answers as JSONL, one file per data-parallel rank."""
    if groups.member:
        return
    folder = run_dir / ROLLOUTS
    folder.mkdir(exist_ok=True)
    rows = (
        {
            "question": rollout.question_index,
            "sample": rollout.sample_index,
            "policy_version": rollout.policy_version,
            "finish_reason": rollout.finish_reason,
            "response_ids": list(rollout.response_ids),
            "text": rollout.text,
            "engine_log_prob": sum(rollout.engine_log_probs),
        }
        for rollout in rollouts
    )
    suffix = f".rank{groups.dp_rank}" if groups.dp_size > 1 else ""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}{suffix}.jsonl", text)


ROLLOUTS = "rollouts"


def dump_batch(run_dir: Path, step: int, sequences: Sequence[UniqueSequence], groups: Groups) -> Path:
    """Write this data-parallel rank's sequences of a step that was skipped, token by token; returns the folder."""
    folder = run_dir / SKIPPED_FOLDER
    if groups.member == 0:
        folder.mkdir(exist_ok=True)
        with (folder / f"step_{step:06d}.rank{groups.dp_rank}.jsonl").open("w", encoding="utf-8") as out:
            for sequence in sequences:
                row = {
                    "question": sequence.rollout.question_index,
                    "sample": sequence.rollout.sample_index,
                    "multiplicity": sequence.multiplicity,
                    "prompt_ids": sequence.rollout.prompt_ids,
                    "response_ids": sequence.rollout.response_ids,
                    "engine_log_probs": sequence.rollout.engine_log_probs,
                }
                out.write(json.dumps(row) + "\n")
    return folder
