"""Move a stack to the versions in `rlsc_mcore/commands/stacks.tsv`: `python -m tests.install.upgrade STACK`.

Copies the stack's versions from the table into its extra in pyproject.toml and into its lists in `launch/`,
prints every package whose version differs from the last commit, reads the names in use from the new wheels
(GPU stacks), and runs the contract tests. For a CPU stack it then runs the test suite in an environment of
its own (`.venv-STACK`). The last lines name each part and its outcome; the exit code is 1 if one failed.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlsc_mcore.commands.stacks import Stack, read_stacks

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = ("tests/install/test_resolution.py", "tests/libraries", "tests/unit/test_packaging.py")
TRANSFORMER_ENGINE = "transformer-engine"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)\s*(;.*)?$")


def main() -> int:
    """Run the parts in turn; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stack", choices=dict.fromkeys(stack.name for stack in read_stacks()))
    parser.add_argument("--no-suite", action="store_true", help="leave the test suite out")
    known = parser.parse_args()
    rows = [stack for stack in read_stacks() if stack.name == known.stack]
    files = files_of(known.stack)
    before = {file: file.read_text(encoding="utf-8") for file in files}
    for file, text in rewritten(rows, before).items():
        file.write_text(text, encoding="utf-8")
    print_changes(files)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parts: list[tuple[str, list[str], dict[str, str]]] = []
    if rows[0].device == "cuda":
        parts.append(("names in use", [sys.executable, "-m", "tests.libraries.table"], {}))
    parts.append(("contract tests", [*pytest, "-m", "slow or not slow", *CONTRACTS], {}))
    if rows[0].device == "cpu" and not known.no_suite:
        own = {"RLSC_STACK": known.stack, "RLSC_VENV": f".venv-{known.stack}"}
        parts.append(("test suite", ["bash", "launch/test.sh"], own))
    return run(parts)


def files_of(stack: str) -> list[Path]:
    """Return the files that repeat the versions of a stack: pyproject.toml and its lists."""
    lists = [f"requirements-{stack}.txt", f"requirements-{stack}-transformer-engine.txt"]
    return [ROOT / "pyproject.toml", *(file for name in lists if (file := ROOT / "launch" / name).is_file())]


def rewritten(rows: Sequence[Stack], texts: Mapping[Path, str]) -> dict[Path, str]:
    """Return the texts of `files_of` with the versions of the rows of one stack."""
    pins = pins_of(rows)
    engine = pins.pop(TRANSFORMER_ENGINE, [])
    changed = {}
    for file, text in texts.items():
        if file.name == "pyproject.toml":
            text = _with_extra(text, rows[0].name, [line for lines in pins.values() for line in lines])
            if engine:
                suffix = rows[0].name.removeprefix("gpu")
                pattern = rf"(?m)^({TRANSFORMER_ENGINE}{suffix} = .*==)[0-9.]+"
                text = re.sub(pattern, rf"\g<1>{rows[0].pins[TRANSFORMER_ENGINE]}", text)
        elif file.stem.endswith(TRANSFORMER_ENGINE):
            pattern = rf"(?m)^({TRANSFORMER_ENGINE}[a-z0-9-]*==).*$"
            text = re.sub(pattern, rf"\g<1>{rows[0].pins[TRANSFORMER_ENGINE]}", text)
        else:
            text = _with_pins(text, pins)
        changed[file] = text
    return changed


def pins_of(rows: Sequence[Stack]) -> dict[str, list[str]]:
    """Return package -> its pins: one, or one per Python version where the rows differ."""
    pins: dict[str, list[str]] = {}
    for package in rows[0].pins:
        versions = {row.pins[package] for row in rows}
        if len(versions) == 1:
            pins[package] = [f"{package}=={versions.pop()}"]
            continue
        older, newer = sorted(rows, key=lambda row: int(row.pythons[0].split(".")[1]))
        bound = newer.pythons[0]
        pins[package] = [
            f'{package}=={older.pins[package]}; python_version < "{bound}"',
            f'{package}=={newer.pins[package]}; python_version >= "{bound}"',
        ]
    return pins


def _with_extra(text: str, name: str, pins: Sequence[str]) -> str:
    items = [f'"{pin.replace(chr(34), chr(39))}"' for pin in sorted(pins)]
    line = f"{name} = [{', '.join(items)}]"
    if len(line) > 110:
        line = "\n".join([f"{name} = [", *(f"    {item}," for item in items), "]"])
    return re.sub(rf"(?ms)^{re.escape(name)} = \[.*?\]$", lambda _: line, text, count=1)


def _with_pins(text: str, pins: Mapping[str, Sequence[str]]) -> str:
    """Replace the pins of a list. A list over another one has only the packages that it changes."""
    left, lines = dict(pins), []
    for line in text.splitlines():
        match = _PIN.match(line)
        package = match[1] if match else ""
        if package not in pins:
            lines.append(line)
        elif package in left:
            lines += left.pop(package)
    return "\n".join(lines) + "\n"


def versions_in(text: str) -> dict[str, str]:
    """Return package -> version of a list, with the condition of each pin."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _PIN.match(line)
        if match:
            pin = f"{match[2]} {(match[3] or '').lstrip('; ')}".strip()
            found[match[1]] = f"{found[match[1]]}, {pin}" if match[1] in found else pin
    return found


def changes(before: str, after: str) -> list[str]:
    """Return one line per package that was added, removed or got another version."""
    old, new = versions_in(before), versions_in(after)
    return [
        f"{package}: {old.get(package, 'absent')} -> {new.get(package, 'absent')}"
        for package in sorted(old.keys() | new.keys())
        if old.get(package) != new.get(package)
    ]


def print_changes(files: Sequence[Path]) -> None:
    """Print what the lists change against the last commit."""
    for file in files:
        if file.suffix != ".txt":
            continue
        name = file.relative_to(ROOT).as_posix()
        shown = subprocess.run(
            ["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        lines = changes(shown.stdout, file.read_text(encoding="utf-8"))
        print(f"{name}, against the last commit: {len(lines)} of its versions differ")
        for line in lines:
            print(f"  {line}")


def run(parts: Sequence[tuple[str, Sequence[str], Mapping[str, str]]]) -> int:
    """Run each part, print the outcomes and return the exit code."""
    outcomes = []
    for name, command, variables in parts:
        begin = time.monotonic()
        print(f"===== {name}: {' '.join(command)}", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False).returncode
        outcomes.append((name, code, time.monotonic() - begin))
    for name, code, seconds in outcomes:
        print(f"{name:<16} {'passed' if code == 0 else f'FAILED (exit {code})':<18} {seconds:.0f} s")
    return int(any(code for _, code, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
