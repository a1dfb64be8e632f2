"""setup.py: one line about what it did, no install that fails because of a compiler, and the right nvcc."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def build(tmp_path, **environment):
    """Run the extension build as an installer does, into a scratch folder."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    settings = {
        name: value for name, value in os.environ.items() if name not in ("CXX", "RLSC_NATIVE")
    } | environment
    run = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=200, check=False
    )
    said = [line for line in run.stderr.splitlines() if line.startswith("rlsc_mcore native ops: ")]
    return run.returncode, said, list((tmp_path / "lib").rglob("_C*.so"))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RLSC_NATIVE": "off"}, "not built (RLSC_NATIVE=off)"),
        ({"CXX": shutil.which("false") or "false"}, "not built ("),
    ],
)
def test_nothing_to_build_with_is_said_and_is_no_error(tmp_path, environment, reason):
    code, said, libraries = build(tmp_path, **environment)
    assert code == 0
    assert len(said) == 1
    assert reason in said[0]
    assert libraries == []


def test_a_demanded_build_that_fails_is_an_error(tmp_path):
    code, _, libraries = build(tmp_path, CXX=shutil.which("false") or "false", RLSC_NATIVE="cpu")
    assert code != 0
    assert libraries == []


def test_a_demanded_cuda_build_fails_with_the_reason(tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch was built for CUDA")
    code, said, libraries = build(tmp_path, RLSC_NATIVE="cuda")
    assert code == 1
    assert said == [
        f"rlsc_mcore native ops: error: RLSC_NATIVE=cuda: torch {torch.__version__} was built without CUDA"
    ]
    assert libraries == []


def test_a_demanded_build_without_a_compiler_fails(tmp_path):
    code, said, _ = build(tmp_path, RLSC_NATIVE="cpu", CXX="no-such-compiler")
    assert code == 1
    assert said == [
        "rlsc_mcore native ops: error: RLSC_NATIVE=cpu: no C++ compiler; install one (package g++) or set CXX"
    ]


def test_an_unknown_demand_is_refused(tmp_path):
    code, said, _ = build(tmp_path, RLSC_NATIVE="gpu")
    assert code == 1
    assert said == ["rlsc_mcore native ops: error: RLSC_NATIVE: expected auto, cpu, cuda, off, got 'gpu'"]


@pytest.fixture
def setup_module():
    spec = importlib.util.spec_from_file_location("setup_of_rlsc", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_toolkit(folder, release, *, headers=True):
    """A CUDA toolkit whose nvcc knows its version only."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n", encoding="utf-8"
    )
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_the_first_toolkit_of_torchs_major_version_is_taken(setup_module, tmp_path, monkeypatch):
    old, bare = make_toolkit(tmp_path / "old", "12.8"), make_toolkit(tmp_path / "bare", "13.0", headers=False)
    fitting, other = make_toolkit(tmp_path / "fitting", "13.5"), make_toolkit(tmp_path / "other", "13.0")
    monkeypatch.setattr(
        setup_module, "cuda_toolkits", lambda: iter([tmp_path / "nothing", old, bare, fitting, other])
    )
    assert setup_module.choose_toolkit("13.0") == (fitting, "")
    assert setup_module.choose_toolkit("12.1") == (old, "")
    toolkit, reason = setup_module.choose_toolkit("14.0")
    assert toolkit is None
    assert reason.startswith("torch was built for CUDA 14.0, and no nvcc fits: ")
    assert (
        f"CUDA 12.8 in {old} is another major version" in reason
        and f"CUDA 13.0 in {bare} has no headers" in reason
    )
    monkeypatch.setattr(setup_module, "cuda_toolkits", lambda: iter([]))
    assert "install the package nvidia-cuda-nvcc or set CUDA_HOME" in setup_module.choose_toolkit("13.0")[1]


def test_toolkits_are_looked_for_in_the_environment_too(setup_module, tmp_path, monkeypatch):
    explicit, packaged = (
        make_toolkit(tmp_path / "explicit", "13.0"),
        make_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.5"),
    )
    monkeypatch.setenv("CUDA_HOME", str(explicit))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(setup_module.sysconfig, "get_path", lambda scheme: str(tmp_path / "site"))
    toolkits = list(setup_module.cuda_toolkits())
    assert toolkits[0] == explicit and toolkits[-1] == packaged


def test_a_versioned_cudart_gets_the_name_that_the_linker_wants(setup_module, tmp_path):
    toolkit = tmp_path / "cu13"
    (toolkit / "lib").mkdir(parents=True)
    (toolkit / "lib" / "libcudart.so.13").touch()
    with setup_module.link_folder(toolkit) as folder:
        assert os.path.realpath(os.path.join(folder, "libcudart.so")) == str(
            toolkit / "lib" / "libcudart.so.13"
        )
    (toolkit / "lib" / "libcudart.so").touch()
    assert setup_module.link_folder(toolkit) is None
