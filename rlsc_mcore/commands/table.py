"""List the commands of `rlsc` with their modules and help lines.

The usage text and the message for an unknown command are made from this table.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlsc_mcore.config import ConfigError


@dataclass(frozen=True)
class Command:
    """One `rlsc NAME`, implemented by `run_NAME(arguments) -> exit code` in `rlsc_mcore.commands.NAME`."""

    name: str
    summary: str  # one line for the usage text
    uses_engine: bool = (
        False  # the command may build an engine: set the libraries' log levels before they are imported
    )

    takes_train_options: bool = False  # the command passes other options on to `rlsc train`

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the command's module and return its function."""
        module = importlib.import_module(f"rlsc_mcore.commands.{self.name}")
        function: Callable[[Sequence[str]], int] = getattr(module, f"run_{self.name}")
        return function


_ROWS = (
    Command(
        "quickstart",
        "train the embedded model by RLSC on this machine and compare it before and after",
        uses_engine=True,
        takes_train_options=True,
    ),
    Command(
        "train",
        "train: rlsc train --config FILE [--section.field VALUE ...] | rlsc train --resume RUN",
        uses_engine=True,
    ),
    Command(
        "compare",
        "train several objectives on the same questions and seeds: one table, one figure",
        takes_train_options=True,
    ),
    Command(
        "sweep",
        "train a grid of settings: rlsc sweep --over algorithm.alpha=0,0.1 ...",
        takes_train_options=True,
    ),
    Command(
        "probe",
        "train without evaluation and report when metrics without labels show a collapse",
        takes_train_options=True,
    ),
    Command(
        "eval",
        "evaluate a model or a run: rlsc eval --model M --benchmarks aime24,math500 --templates all",
        uses_engine=True,
        takes_train_options=True,
    ),
    Command("watch", "follow a run from another terminal: curves, phase, time left, warnings"),
    Command("report", "write one self-contained page about one run or several: rlsc report RUN [RUN ...]"),
    Command("chat", "ask a run's model before and after training, answers side by side", uses_engine=True),
    Command("export", "write a run's weights as a Hugging Face folder", uses_engine=True),
    Command("status", "print the state of a run, read from its files: rlsc status RUN"),
    Command(
        "plan",
        "memory, layout and seconds before a run, without a GPU: rlsc plan --model NAME --gpus N "
        "--gpu-memory-gib M",
    ),
    Command("rehearse", "take a recipe's training steps on fake GPUs: rlsc rehearse --config FILE --gpus N"),
    Command(
        "prepare",
        "make a model folder from packaged weights: rlsc prepare smollm2 --output DIR",
        uses_engine=True,
    ),
    Command("doctor", "check versions, devices and combinations that are known to fail"),
    Command("completion", "print the completion of a shell: rlsc completion bash | zsh"),
)
COMMANDS = {command.name: command for command in _ROWS}


def usage() -> str:
    """Return the text of `rlsc --help`."""
    rows = "\n".join(f"  {command.name:<12} {command.summary}" for command in _ROWS)
    return (
        f"usage: rlsc COMMAND [OPTIONS]\n\ncommands:\n{rows}\n\n`rlsc COMMAND --help` documents every option."
    )


def find_command(name: str) -> Command:
    """Return the command `name`; raises `ConfigError` with the list of commands and the closest name."""
    if name in COMMANDS:
        return COMMANDS[name]
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ConfigError(
        f"unknown command {name!r}{hint}; expected {', '.join([*COMMANDS][:-1])} or {[*COMMANDS][-1]}"
    )
