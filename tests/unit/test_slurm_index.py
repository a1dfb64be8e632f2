"""The index of what the tests on a real SLURM show: it must name every test, and no other."""

import re
from pathlib import Path

import tests.slurm

FOLDER = Path(tests.slurm.__file__).parent


def test_the_index_is_complete() -> None:
    files = [
        path for path in FOLDER.glob("test_*.py") if path.name != "test_table2.py"
    ]  # the paper's chain has its own page
    written = {
        name
        for path in files
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"\btest_\w+", tests.slurm.__doc__ or "")) - {path.stem for path in files}
    assert named == written
