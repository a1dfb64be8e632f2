"""Build a wheel as a release does: from the source distribution, outside the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (
    "csrc",
    "rlsc_mcore",
    "configs",
    "launch",
    "pyproject.toml",
    "setup.py",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
)
_BUILT = ("__pycache__", "*.so", "*.egg-info", "_C.build.txt")
_SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"


def build_wheel(folder: Path, *, native: str) -> Path:
    """Build a wheel in `folder` and return it; `native` is RLSC_NATIVE. The dependencies are not
    downloaded."""
    source = folder / "source"
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*_BUILT))
        else:
            shutil.copy(ROOT / name, source / name)
    _run([sys.executable, "-c", _SDIST, str(folder)], source, "off")
    (archive,) = folder.glob("*.tar.gz")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*pip_wheel, "--wheel-dir", str(folder), str(archive)], folder, native)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _run(command: list[str], folder: Path, native: str) -> None:
    environment = {**os.environ, "RLSC_NATIVE": native}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
