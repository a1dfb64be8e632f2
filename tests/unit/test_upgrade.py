"""The upgrade of a stack: its versions have one source, and every list that repeats them follows."""

import dataclasses
from pathlib import Path

import pytest

from rlsc_mcore.commands.stacks import read_stacks
from tests.install.upgrade import changes, files_of, pins_of, rewritten

NAMES = list(dict.fromkeys(stack.name for stack in read_stacks()))


def texts(name: str) -> dict[Path, str]:
    return {file: file.read_text(encoding="utf-8") for file in files_of(name)}


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_files_follow_the_table(name: str) -> None:
    rows = [stack for stack in read_stacks() if stack.name == name]
    assert rewritten(rows, texts(name)) == texts(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_version_reaches_every_file_and_nothing_else(name: str) -> None:
    rows = [stack for stack in read_stacks() if stack.name == name]
    package = "transformer-engine" if rows[0].device == "cuda" else "megatron-core"
    old = rows[0].pins[package]
    newer = [dataclasses.replace(row, pins=row.pins | {package: "99.1"}) for row in rows]
    before = texts(name)
    for file, text in rewritten(newer, before).items():
        pairs = zip(text.splitlines(), before[file].splitlines(), strict=True)
        differing = [(new, was) for new, was in pairs if new != was]
        holds = package == "megatron-core" or file.name == "pyproject.toml" or package in file.stem
        assert bool(differing) == holds, file.name
        assert all(new == was.replace(f"=={old}", "==99.1") for new, was in differing)


def test_pins_that_depend_on_python() -> None:
    first, second = (stack for stack in read_stacks() if stack.name == "gpu-current")
    newer, older = sorted((first, second), key=lambda row: "3.11" in row.pythons)
    pins = pins_of([first, second])
    assert pins["torch"] == [f"torch=={first.pins['torch']}"]
    assert pins["megatron-core"] == [
        f'megatron-core=={older.pins["megatron-core"]}; python_version < "3.12"',
        f'megatron-core=={newer.pins["megatron-core"]}; python_version >= "3.12"',
    ]


def test_changes_name_old_and_new_versions() -> None:
    before = '# list\na==1\nb==2; python_version < "3.12"\nc==3\n'
    after = '# list\na==1\nb==2.1; python_version < "3.12"\nd==4\n'
    assert changes(before, after) == [
        'b: 2 python_version < "3.12" -> 2.1 python_version < "3.12"',
        "c: 3 -> absent",
        "d: absent -> 4",
    ]
