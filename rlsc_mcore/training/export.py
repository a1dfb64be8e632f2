"""Export a run: its weights as a Hugging Face folder."""

from pathlib import Path

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.model.build import Policy
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder, write_hf_folder
from rlsc_mcore.model.lora import write_adapter
from rlsc_mcore.model.weight_map import export_weights
from rlsc_mcore.observability.console import Reporter, counted
from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.parallel.groups import Groups, initialize_groups
from rlsc_mcore.run.folder import LATEST, config_file, find_checkpoint
from rlsc_mcore.run.made_here import check_replaceable
from rlsc_mcore.training.checkpoint import load_checkpoint
from rlsc_mcore.training.step import Trainer


def export_run(run_dir: Path, output: Path, checkpoint: str = LATEST, *, adapter: bool = False) -> Path:
    """Write the weights of a run's checkpoint to `output` and return the checkpoint.

    `adapter`: write only the LoRA adapter, as `peft` loads it; `ConfigError` for a run without one.
    Collective over the world. No engine is built. `checkpoint` is read as in `find_checkpoint`. Raises
    `ConfigError` if `output` exists and is no earlier export, and if it is or contains the run or the model
    that is read.
    """
    file = config_file(run_dir)
    chosen = find_checkpoint(run_dir, checkpoint)
    config: Config = load_config(file)
    if adapter and not config.lora.is_on:
        raise ConfigError(f"--adapter: {run_dir} trained all weights (lora.rank is 0); leave --adapter out")
    model_folder = resolve_model_folder(config.model.path)
    check_replaceable(output, field="--output", keep=(run_dir, model_folder))
    backend = get_backend()
    groups = initialize_groups(backend, config.parallel.tp, pp=config.parallel.pp)
    trainer = Trainer(config, model_folder, backend, groups, load=config.lora.is_on)
    load_checkpoint(chosen, trainer)
    if adapter and trainer.policy.adapters is not None:
        write_adapter(trainer.policy.adapters, config.lora, config.model.path, output, groups)
    else:
        write_policy(trainer.policy, model_folder, output, config.model.dtype, groups)
    return chosen


def write_policy(policy: Policy, model_folder: Path, output: Path, dtype: str, groups: Groups) -> None:
    """Write a policy as a Hugging Face folder with the tokenizer of `model_folder`.

    Collective over the ranks of a model group.
    """
    tensors = export_weights(
        policy.model_weights, policy.architecture, groups.tp_group, groups.tp_size, groups.pp_group
    )
    with Reporter(groups.is_main).bar("exporting, tensors") as bar:
        write_hf_folder(counted(tensors, bar), model_folder, output, dtype=dtype, write=groups.is_main)
