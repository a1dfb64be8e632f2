"""Print for users: progress bars on a terminal, plain lines elsewhere, quiet libraries. Imports no torch."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from rlsc_mcore.run.printable import printable
from rlsc_mcore.run.scratch import private_cache

_LIBRARY_DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process of the trainer
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # starts Megatron's communication before the compute that overlaps it
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOO_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Number of shapes for which torch and oneDNN cache kernels. Every number of tokens is a new shape, so
    # with the default of 1024 each, the memory of a process grows for hundreds of steps.
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # busy-waiting OpenMP threads slow a shared machine down by up to 60x; set it to your number of cores
    "OMP_NUM_THREADS": "1",
}


def quiet_libraries() -> None:
    """Set the environment variables that torch, vLLM and Megatron-Core read at import, and filter their
    output.

    Variables that the user has set are kept. Call this before torch is imported. Mutates the environment and
    the warning filters.
    """
    for name, value in _LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # torch's default is a folder in /tmp with a predictable name, which another user could create first.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache("inductor"))
    logging.getLogger("vllm").setLevel(logging.ERROR)  # vLLM logs before it reads its log level
    warnings.simplefilter("ignore")  # warnings of libraries; our own warnings go to metrics and console


class ProgressBar(Protocol):
    """A progress bar."""

    def advance(self, amount: int) -> None:
        """Advance the bar by `amount`."""


class Reporter:
    """Print to the console on the main rank; other ranks print nothing."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console(
            file=sys.stdout, quiet=not enabled, highlight=False, soft_wrap=True, emoji=False
        )

    def line(self, text: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(printable(text), style=style, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.line(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[ProgressBar]:
        """Show a progress bar inside the block if the output is a terminal."""
        if not self.enabled or not self.console.is_terminal:
            yield _NoBar()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(description, total=total))


class _NoBar:
    def advance(self, amount: int) -> None:
        pass


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int) -> None:
        self._progress.update(self._task, advance=amount)
