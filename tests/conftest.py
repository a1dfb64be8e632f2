"""Settings of every test: the libraries' environment, seeds, and the marks that follow from a test's
folder."""

import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # more threads than quiet cores make a tiny model's steps many times slower
    "HF_HUB_OFFLINE": "1",  # no test may depend on a hub
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the test's process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)

_FOLDER_MARKS = ("distributed", "e2e", "gpu", "slurm")
_LONGEST = (
    "test_stop_and_resume.py",
    "test_train_command.py",
    "test_steps.py",
    "test_engine_tp.py",
    "test_triton_interpreter.py",
)
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder, and skip those whose machine this is not: no GPU, no SLURM commands.

    The files that take longest come first, so that parallel workers end at about the same time.
    """
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    for item in items:
        folder = item.path.relative_to(_HERE).parts[0] if item.path.is_relative_to(_HERE) else ""
        if folder in _FOLDER_MARKS:
            item.add_marker(folder)
    for mark, is_absent, reason in (
        ("gpu", _no_gpu, "no NVIDIA GPU"),
        ("slurm", _no_slurm, "no SLURM commands (sbatch)"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and is_absent():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_slurm() -> bool:
    return shutil.which("sbatch") is None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_watchdog_stays() -> Iterator[None]:
    """Fail a test that leaves a watchdog open: it would end this process, and all later tests with it."""
    yield
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(5)
            assert not thread.is_alive(), "the test left a watchdog open"
