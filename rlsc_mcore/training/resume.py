"""Continue a run from a checkpoint; fall back to an earlier one if it is damaged."""

from collections.abc import Callable
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.training.checkpoint import load_checkpoint
from rlsc_mcore.training.checkpoint_files import CheckpointError, RunState, set_aside
from rlsc_mcore.training.inputs import RunInputs
from rlsc_mcore.training.step import Trainer


def continue_run(
    checkpoint: Path, run_dir: Path, trainer: Trainer, inputs: RunInputs, warn: Callable[[str], None]
) -> int:
    """Load `checkpoint` and return the number of steps that are done; collective over the world.

    Raises `ConfigError` if the run was trained on other questions than `inputs`.
    """
    # Within its own directory a run falls back to an earlier checkpoint if the last is damaged. For a
    # checkpoint from elsewhere that would load other weights than the user chose.
    if checkpoint.is_relative_to(run_dir):
        state = resume(checkpoint, trainer, warn)
    else:
        state = load_checkpoint(checkpoint, trainer)
    if inputs.record is not None and state.questions != inputs.fingerprint:
        raise ConfigError(
            f"data.path: {trainer.config.data.path} has changed since the run was started; resume needs the "
            "same questions"
        )
    return state.steps_done


def resume(checkpoint: Path, trainer: Trainer, warn: Callable[[str], None]) -> RunState:
    """Load `checkpoint` or, if it is damaged, an earlier one with a warning; collective over the world.

    A damaged folder is renamed to `*.damaged`, and `latest` then names the checkpoint before it. Raises
    `CheckpointError` if no checkpoint is intact.
    """
    groups = trainer.groups
    while True:
        try:
            return load_checkpoint(checkpoint, trainer)
        except CheckpointError as error:
            earlier = groups.gather_objects(set_aside(checkpoint) if groups.is_main else None)[0]
            if earlier is None:
                raise
            warn(f"{error}; going on from {earlier} instead")
            checkpoint = earlier
