"""Resolve a command line to the configuration of a run and the checkpoint to resume from. Imports no
torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.config_file import changed_fields, load_config, parse_config, read_flags, shipped_configs
from rlsc_mcore.run.folder import CONFIG_FILE, config_file, find_resumable, newest_checkpoint

TRAIN_HELP = """Train a language model by RLSC.

  rlsc train --config FILE [--section.field VALUE ...]   start a run (or go on with the same one)
  rlsc train --resume RUN [--training.num-steps N]       go on where RUN stopped
  rlsc train ... --dry-run [--gpus N --gpu-memory-gib M]  plan memory and layout of this configuration, and stop

A flag wins over the file. The same command works under torchrun and srun."""

# Fields that `--resume` may change: run length, checkpoint frequency, logging, parallel layout. Any other
# change raises ConfigError.
RESUMABLE_FIELDS = (
    "run_dir",
    "training.num_steps",
    "training.save_every",
    "training.stop_",
    "training.keep_",
    "training.async_save",
    "training.recompute",
    "training.tokens_per_micro_batch",
    "optimizer.offload_during_rollout",
    "parallel.",
    "observability.",
    "ops.",
)


def resolve_training(options: Mapping[str, str], flags: Sequence[str]) -> tuple[Config, Path | None]:
    """Return the configuration of `rlsc train` and the checkpoint to resume from, or None for a new run.

    Raises `ConfigError` if the run folder holds a run with another configuration, or if `--resume` changes a
    field outside `RESUMABLE_FIELDS`. Imports no torch.
    """
    if "--resume" in options:
        if "--config" in options:
            raise ConfigError("--resume: a run brings its own configuration; leave --config out")
        run_dir = Path(options["--resume"])
        file = config_file(run_dir, "--resume")
        old = load_config(file)
        config = load_config(file, ["--run-dir", str(run_dir), *flags])
        foreign = [
            change for change in changed_fields(old, config) if not change.startswith(RESUMABLE_FIELDS)
        ]
        if foreign:
            raise ConfigError(f"--resume {run_dir}: cannot change {'; '.join(foreign)}; start another run")
        return config, find_resumable(run_dir)
    if "--config" not in options and not flags:
        shipped = ", ".join(map(str, shipped_configs()))
        raise ConfigError(f"--config: expected a configuration file; shipped: {shipped}")
    file_flags = read_flags(Path(options["--config"])) if "--config" in options else []
    config = parse_config([*file_flags, *flags], description=TRAIN_HELP)
    return config, _same_run(config)


def _same_run(config: Config) -> Path | None:
    """Return the checkpoint to resume from if `run_dir` holds a run with this configuration; None for a new
    run."""
    run_dir = Path(config.run_dir)
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        return None
    changes = changed_fields(load_config(file), config)
    if changes:
        raise ConfigError(
            f"run_dir: {run_dir} holds a run with another configuration ({'; '.join(changes)}); choose "
            "another folder"
        )
    return newest_checkpoint(run_dir)


def split_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into {name: value} for the options `names`, and the remaining arguments.

    Accepts `--name VALUE` and `--name=VALUE`.
    """
    taken: dict[str, str] = {}
    rest = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, separator, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
        elif separator:
            taken[name] = value
        elif queue:
            taken[name] = queue.pop(0)
        else:
            raise ConfigError(f"{name}: expected a value after it")
    return taken, rest
