"""Find the files that ship beside the code: `configs` and `launch` of a checkout, or of an installed wheel,
which carries both inside the package. Imports only the standard library."""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent

IS_CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file()
"""Whether the package is read from a checkout of the repository, not from an installed wheel."""


def shipped_folder(name: Literal["configs", "launch"]) -> Path:
    """Return the folder of the shipped configurations, or of the launch scripts and lists of packages."""
    return (_PACKAGE.parent if IS_CHECKOUT else _PACKAGE) / name
