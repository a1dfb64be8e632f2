"""Print for users: progress bars on a terminal, plain lines elsewhere, quiet libraries. Imports no torch."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

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

from rlsc_mcore.run.cores import DEFAULT_THREADS, threads_are_set
from rlsc_mcore.run.printable import printable
from rlsc_mcore.run.progress import Counter, regular_lines
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
    # A run on a CPU raises it by the size of its model (`training.cpu_tuning`).
    "OMP_NUM_THREADS": "1",
    # Threads that wait for others sleep. With busy waiting a product took up to 60 times longer on cores that
    # other processes used.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def quiet_libraries() -> None:
    """Set the environment variables that torch, vLLM and Megatron-Core read at import, and filter their
    output.

    Variables that the user has set are kept. Call this before torch is imported. Mutates the environment and
    the warning filters.
    """
    if not threads_are_set():
        os.environ[DEFAULT_THREADS] = "1"
    for name, value in _LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # torch's default is a folder in /tmp with a predictable name, which another user could create first.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache("inductor"))
    logging.getLogger("vllm").setLevel(logging.ERROR)  # vLLM logs before it reads its log level
    warnings.simplefilter("ignore")  # warnings of libraries; our own warnings go to metrics and console


Item = TypeVar("Item")


class ProgressBar(Protocol):
    """A progress bar, or another counter of progress."""

    def advance(self, amount: int, tokens: int | None = None) -> None:
        """Add `amount` finished units of work, which have `tokens` tokens if that is known."""


class ProgressBars(Protocol):
    """Make progress bars."""

    def bar(
        self, description: str, total: int = 0, *, tokens_each: float = 0.0
    ) -> AbstractContextManager[ProgressBar]:
        """Show the progress of the block; see `Reporter.bar`."""


class _NoBar:
    def advance(self, amount: int, tokens: int | None = None) -> None:
        pass


NO_BAR: ProgressBar = _NoBar()


def counted(items: Iterable[Item], bar: ProgressBar) -> Iterator[Item]:
    """Yield `items` and advance `bar` by one after each."""
    for item in items:
        yield item
        bar.advance(1)


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
    def bar(self, description: str, total: int = 0, *, tokens_each: float = 0.0) -> Iterator[ProgressBar]:
        """Show the progress of the block: a bar on a terminal, else a line every 30 seconds.

        `total` is the number of units of work, 0 if it is not known. `tokens_each` is the mean number of
        tokens of a unit, for the tokens per second in the lines. Work that ends sooner prints no line.
        """
        if not self.enabled:
            yield NO_BAR
            return
        if not self.console.is_terminal:
            counter = Counter(description, total, tokens_each)
            with regular_lines(counter.line, self.line):
                yield counter
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(description, total=total or None))


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int, tokens: int | None = None) -> None:
        self._progress.update(self._task, advance=amount)
