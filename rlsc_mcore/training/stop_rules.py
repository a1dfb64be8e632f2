"""Stop a run when its steps change no weight or when its engine samples a policy other than the trainer's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config import CollectiveRunError, Config
from rlsc_mcore.observability.mismatch import coarser, mismatched_steps, stop_limit
from rlsc_mcore.run.folder import SKIPPED_FOLDER

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def compared_dtype(config: Config) -> str:
    """Return the data type that sets the limits for the difference between trainer and engine."""
    return coarser(config.model.dtype, config.rollout.dtype or config.model.dtype)


def skipped_steps(rows: Rows) -> list[int]:
    """Return the indices of the steps that changed no weight because loss or gradient was not finite."""
    return [row["step"] for row in rows if row.get("skipped")]


def count_mismatched_steps(rows: Rows, config: Config) -> int:
    """Count the most recent consecutive steps whose answers were sampled by other weights than the trainer's.

    Returns 0 if `observability.max_mismatched_steps` is 0; such steps then only cause a warning.
    """
    options = config.observability
    if not options.max_mismatched_steps:
        return 0
    return mismatched_steps(rows, stop_limit(compared_dtype(config), options.max_log_prob_gap))


def stop_when_skipping(rows: Rows, config: Config, run_dir: Path, save: Callable[[], None]) -> None:
    """Call `save` and raise `CollectiveRunError` after too many consecutive skipped steps.

    `training.max_skipped_steps` is the limit. A resumed run continues the count.
    """
    limit = config.training.max_skipped_steps
    last = rows[-limit:]
    if len(last) == limit and all(row["skipped"] for row in last):
        save()
        raise CollectiveRunError(
            f"{limit} steps in a row were not finite and were skipped (training.max_skipped_steps); the "
            "weights of before them are "
            f"saved, the batches are in {run_dir / SKIPPED_FOLDER}: lower optimizer.lr, or look for the "
            "answers that break it"
        )


def stop_when_mismatched(rows: Rows, config: Config, finish_saving: Callable[[], None]) -> None:
    """Call `finish_saving` and raise `CollectiveRunError` after too many consecutive mismatched steps."""
    count = count_mismatched_steps(rows, config)
    if not count or count < config.observability.max_mismatched_steps:
        return
    finish_saving()
    gap = rows[-1]["log_prob_gap_mean"]
    raise CollectiveRunError(
        f"trainer and engine disagreed on the sampled tokens in {count} steps in a row, by {gap:.2e} per "
        "token in the last "
        "(observability.max_log_prob_gap): the engine does not sample the policy that is trained; these "
        "steps are not saved, "
        f"the last checkpoint is whole: go on from it with --resume, which builds a new engine"
    )
