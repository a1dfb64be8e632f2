"""Write checkpoints of a trainer without a run."""

from pathlib import Path

from rlsc_mcore.training.checkpoint import CheckpointSaver
from rlsc_mcore.training.step import Trainer


def save_checkpoint(
    run_dir: Path, trainer: Trainer, steps_done: int, policy_version: int, questions: str, keep_last: int
) -> Path:
    """Write one checkpoint and wait for it; collective over the world."""
    return CheckpointSaver(run_dir, trainer, questions, keep_last=keep_last).save(steps_done, policy_version)
