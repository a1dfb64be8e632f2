"""A wheel with the CPU ops, built from the source distribution, works in a fresh environment without a
checkout.

The dependencies are those of the running environment, which the fresh one reads through a path file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.wheel import ROOT, build_wheel

TRAINING = (
    "--data.questions-per-step", "4", "--rollout.num-samples", "4", "--rollout.max-new-tokens", "40",
    "--training.num-steps", "2", "--evaluation.path", "None",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
]


def _environment(**settings: str) -> dict[str, str]:
    """The environment of a user: nothing that leads to the checkout or to this environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RLSC_", "PIP_", "SLURM_", "VIRTUAL_ENV")) and name != "PYTHONPATH"
    }
    return {**kept, **settings}


def _run(command: list[object], folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder, env=_environment(**settings), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build"), native="cpu")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which finds the dependencies in the running environment."""
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", environment], environment.parent)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    _run(pip, environment.parent)
    (site,) = environment.glob("lib/python3.*/site-packages")
    # The path files of that folder are not read, so the editable entry of this package stays out.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n", encoding="utf-8")
    return environment


def test_a_wheel_has_the_native_ops_for_every_python(wheel: Path) -> None:
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "rlsc_mcore/_C.abi3.so" in names and "rlsc_mcore/_C.build.txt" in names


def test_a_wheel_trains_the_embedded_model_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    rlsc = installed / "bin" / "rlsc"
    doctor = _run([rlsc, "doctor"], tmp_path).stdout
    package = next(installed.glob("lib/python3.*/site-packages/rlsc_mcore")).resolve()
    assert f"configurations: {package}/configs; launch scripts: {package}/launch" in doctor
    assert "rlsc_mcore._C loads; built for CPU only (RLSC_NATIVE=cpu)" in doctor
    assert str(ROOT) not in doctor

    config = package / "configs" / "tiny_cpu.yaml"
    _run([rlsc, "train", "--config", config, "--run-dir", "run", *TRAINING], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and not any(row["skipped"] for row in rows)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["engine_equals_export"] is True
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_a_launch_script_of_a_wheel_uses_its_environment(installed: Path, tmp_path: Path) -> None:
    (package,) = installed.glob("lib/python3.*/site-packages/rlsc_mcore")
    script = package / "launch" / "rlsc_1.5b_1gpu.sh"
    settings = {"PYTHON": "", "RLSC_CONFIG": str(package / "configs" / "tiny_cpu.yaml"), "GPUS_PER_NODE": "1"}
    plan = _run(["bash", script, "--dry-run"], tmp_path, **settings).stdout
    assert f"{installed}/bin/python -m rlsc_mcore.cli train --config {package}/configs/tiny_cpu.yaml" in plan
    chain = [
        "bash",
        package / "launch" / "reproduce_table2.sh",
        "--dry-run",
        "--sizes",
        "tiny",
        "--seeds",
        "0",
    ]
    assert f"{installed}/bin/python -m rlsc_mcore.cli eval" in _run([*chain, "--steps", "1"], tmp_path).stdout
