"""Write a run's files in its directory: the resolved configuration, the rollouts and skipped batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.config_file import changed_fields, dump_config, load_config
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.files import to_json, write_atomically
from rlsc_mcore.run.folder import CONFIG_FILE, EXPORT_FOLDER, SKIPPED_FOLDER
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.run.made_here import check_replaceable
from rlsc_mcore.run.owner import FolderInUse, Owner, own
from rlsc_mcore.types import UniqueSequence

if TYPE_CHECKING:
    from rlsc_mcore.types import Rollout


def claim_run_folder(
    run_dir: Path, config: Config, groups: "Groups", warn: Callable[[str], None], *, resuming: bool
) -> Owner | None:
    """Take ownership of the directory of the run and write the resolved configuration.

    Collective over the world. Returns the owner on the main rank, None on the others. Raises `ConfigError` on
    every rank, before the configuration is written: if the directory holds a run with another configuration
    (unless `resuming`) or an `export` that this program did not make, if another process owns it
    (`FolderInUse`), and if it cannot be written.
    """
    file = run_dir / CONFIG_FILE
    if file.is_file() and not resuming:
        changes = changed_fields(load_config(file), config)
        if changes:
            raise ConfigError(
                f"run_dir: {run_dir} holds a run with another configuration ({'; '.join(changes)}); choose "
                "another folder"
            )
    owner: Owner | None = None
    failure = in_use = ""
    if groups.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            owner = own(run_dir)
            check_replaceable(run_dir / EXPORT_FOLDER, field="run_dir")
            write_atomically(file, dump_config(config))
        except FolderInUse as error:
            in_use = str(error)
        except ConfigError as error:
            failure = str(error)
        except OSError as error:
            failure = f"run_dir: {explain(error, run_dir) or error}"
    in_use, failure = groups.gather_objects([in_use, failure])[0]
    if in_use:
        raise FolderInUse(f"run_dir: {in_use}")
    if failure:
        raise ConfigError(failure)
    if owner is not None and owner.took_over:
        warn(f"took over {run_dir} from {owner.took_over}, which has ended without giving it up")
    return owner


def write_rollouts(run_dir: Path, step: int, rollouts: "Sequence[Rollout]", groups: "Groups") -> None:
    """Write a step's answers as JSONL, one file per engine."""
    if groups.engine_tp_rank:
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
    suffix = f".rank{groups.engine_index}" if groups.num_engines > 1 else ""
    text = "".join(to_json(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}{suffix}.jsonl", text)


ROLLOUTS = "rollouts"


def dump_batch(run_dir: Path, step: int, sequences: Sequence[UniqueSequence], groups: Groups) -> Path:
    """Write this data-parallel rank's sequences of a skipped step, token by token; return the folder."""
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
                out.write(to_json(row) + "\n")
    return folder
