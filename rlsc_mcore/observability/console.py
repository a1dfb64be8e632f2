"""What a person sees: quiet libraries, rich progress on a terminal, plain lines elsewhere. Imports no
torch."""

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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, beside the trainer
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # orders Megatron's communication before the compute that overlaps it
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOO_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Shapes that torch and oneDNN keep prepared kernels for; with ragged batches every number of tokens is a
    # new shape, and their own limit of 1024 each lets a process grow for hundreds of steps.
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # spinning OpenMP threads cost up to 60x on a busy machine; set it to the cores you own
    "OMP_NUM_THREADS": "1",
}


def quiet_libraries() -> None:
    """Set what torch, vLLM and Megatron-Core read at import (unless the user has), and filter their start-up
    noise.

    To be called before torch is imported; mutates the environment and the warning filters.
    """
    for name, value in _LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # torch would take a folder of a known name in /tmp, which another user may have made first.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache("inductor"))
    logging.getLogger("vllm").setLevel(logging.ERROR)  # vLLM's first lines come before it reads its own level
    warnings.simplefilter("ignore")  # of the libraries; our own warnings go to metrics and console


class ProgressBar(Protocol):
    """Something to advance."""

    def advance(self, amount: int) -> None:
        """Move on by `amount`."""


class Reporter:
    """Prints for people; silent on ranks other than the main one."""

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
        """Show a bar on a terminal; nothing elsewhere."""
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
