"""The audit of pinned packages: what pip-audit is asked, and what is refused. pip-audit is replaced by a
program that records its call, since the database needs a network."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" >"$CALL"\nwhile [ "$1" != --requirement ]; do shift; done\ncat "$2" >"$PINS"\nexit "$OUTCOME"\n'


def audit(
    folder: Path, pins: str, exceptions: str = "", outcome: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a copy of .ci/audit with a list and exceptions of its own."""
    (folder / "bin").mkdir()
    (folder / "list.txt").write_text(pins)
    (folder / "audit_exceptions.txt").write_text(exceptions)
    shutil.copy(ROOT / ".ci" / "audit", folder / "audit")
    program = folder / "bin" / "pip-audit"
    program.write_text(RECORDER)
    program.chmod(0o755)
    variables = {"CALL": str(folder / "call"), "PINS": str(folder / "pins"), "OUTCOME": str(outcome)}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(folder / "audit"), str(folder / "list.txt")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | variables | {"PATH": path},
    )


def test_every_pin_is_looked_up_without_its_build(tmp_path: Path) -> None:
    pins = (
        "# a comment\ntorch==2.13.0+cpu\nuvicorn[standard]==0.54.0 ; python_version > '3.10'\n-r other.txt\n"
    )
    assert audit(tmp_path, pins).returncode == 0
    assert (tmp_path / "pins").read_text().split() == ["torch==2.13.0", "uvicorn==0.54.0"]
    assert "--strict" in (tmp_path / "call").read_text().split()  # otherwise what is unknown counts as safe


def test_exceptions_need_a_reason(tmp_path: Path) -> None:
    ended = audit(tmp_path, "torch==2.13.0\n", "# why\nPYSEC-1 not reached: no server is started\nGHSA-2\n")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "audit_exceptions.txt:3: GHSA-2 has no reason" in ended.stderr


def test_exceptions_with_a_reason_are_ignored(tmp_path: Path) -> None:
    assert audit(tmp_path, "torch==2.13.0\n", "PYSEC-1 not reached: no server is started\n").returncode == 0
    assert "--ignore-vuln\nPYSEC-1\n" in (tmp_path / "call").read_text()


@pytest.mark.parametrize("outcome", [1, 3])
def test_a_finding_is_exit_code_1(tmp_path: Path, outcome: int) -> None:
    assert audit(tmp_path, "torch==2.13.0\n", outcome=outcome).returncode == 1


def test_a_list_without_pins_is_refused(tmp_path: Path) -> None:
    ended = audit(tmp_path, "torch\n")
    assert ended.returncode == 2 and "no pinned packages" in ended.stderr


def test_the_committed_exceptions_have_reasons() -> None:
    lines = (ROOT / ".ci" / "audit_exceptions.txt").read_text().splitlines()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines if line and not line.startswith("#"))
