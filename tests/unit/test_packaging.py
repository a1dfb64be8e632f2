"""What is installed is what was measured: pins agree wherever they are written, and the package carries its data."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rlsc_mcore.commands.doctor import PINS
from rlsc_mcore.parallel.packages import TORCHVISION_FAMILY

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
LISTS = sorted(LAUNCH.glob("requirements-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _pins(path: Path) -> dict[str, str]:
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            assert name not in pins, f"{path.name}: {name} twice"
            pins[name] = version
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_doctor_measures_against_the_versions_that_are_installed() -> None:
    cuda = _pins(LAUNCH / "requirements-gpu.txt") | _pins(LAUNCH / "requirements-transformer-engine.txt")
    for stack, installed in (("cpu", _pins(LAUNCH / "requirements-cpu.txt")), ("cuda", cuda)):
        assert {name: installed.get(name) for name in PINS[stack]} == PINS[stack]


def test_the_extras_name_the_same_pins() -> None:
    extras = PROJECT["optional-dependencies"]
    for stack, named in (("cpu", extras["cpu"]), ("cuda", extras["gpu"] + extras["transformer-engine"])):
        pins = {_normal(text.partition("==")[0].partition("[")[0]): text.partition("==")[2] for text in named}
        core = {"megatron-core": "0.16.1"}
        assert pins | core == PINS[stack]
    assert "megatron-core==0.16.1" in PROJECT["dependencies"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_lists_hold_every_dependency(device: str) -> None:
    pins = _pins(LAUNCH / f"requirements-{device}.txt")
    for requirement in PROJECT["dependencies"]:
        assert _normal(re.split(r"[<>=!\[; ]", requirement)[0]) in pins, requirement


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_the_lists_are_exact_normalised_and_name_no_place(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text and "@" not in text and "--" not in re.sub(r"#.*", "", text)
    for name, version in _pins(path).items():
        assert name == _normal(name)
        assert re.fullmatch(r"[0-9a-z.]+", version), f"{path.name}: {name} is not pinned"
        assert name != "apex", "the index's package of that name is not NVIDIA's Apex"


def test_the_cpu_list_leaves_out_what_does_not_load_beside_a_cpu_torch() -> None:
    assert not {*TORCHVISION_FAMILY, "triton"} & set(_pins(LAUNCH / "requirements-cpu.txt"))


def _install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RLSC_")} | environment
    return subprocess.run(
        ["bash", str(LAUNCH / "install.sh"), *arguments], env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "error"),
    [
        (("--with", "everything"), {}, "--with takes test, smollm2, hub, wandb or bench, got 'everything'"),
        (("--with",), {}, "--with takes test, smollm2, hub, wandb or bench, got ''"),
        (("--fast",), {}, "unknown argument '--fast'"),
        ((), {"RLSC_DEVICE": "tpu"}, "RLSC_DEVICE: expected cpu or cuda, got 'tpu'"),
        ((), {"RLSC_DEVICE": "cpu", "RLSC_PYTHON": "python0.9"}, "no suitable Python among python0.9"),
    ],
)
def test_install_refuses_what_it_cannot_do_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], error: str
) -> None:
    done = _install(*arguments, **{"RLSC_VENV": str(tmp_path / "venv"), **environment})
    assert done.returncode == 1
    assert done.stderr.startswith("install: error: " + error), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_install_touches_no_environment_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("mine", encoding="utf-8")
    done = _install(RLSC_DEVICE="cpu", RLSC_VENV=str(tmp_path))
    assert done.returncode == 1
    assert "was not made by this script; move it away or set RLSC_VENV" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_install_explains_itself() -> None:
    done = _install("--help")
    assert done.returncode == 0
    for setting in ("RLSC_DEVICE", "RLSC_PYTHON", "RLSC_VENV", "RLSC_TORCH_INDEX", "RLSC_TRANSFORMER_ENGINE"):
        assert setting in done.stdout


def test_the_built_package_carries_its_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "rlsc_mcore", source / "rlsc_mcore", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run(
        command, cwd=source, env={**os.environ, "RLSC_NATIVE": "off"}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rlsc_mcore/")}
    expected = {str(path.relative_to(source)) for path in (source / "rlsc_mcore").rglob("*") if path.is_file()}
    assert expected - packed == set()
