"""Hugging Face folders: find, check, read slice by slice, write whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlsc_mcore.config import ConfigError, ModelConfig
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, hf_shapes, shard_pieces
from rlsc_mcore.run.made_here import check_replaceable, replacing

EMBEDDED = "embedded:"
MAX_SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
# Beside the weights, what makes a folder complete for transformers and vLLM.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def resolve_model_folder(path: str) -> Path:
    """Return the local folder of `model.path`: itself, an embedded asset, or a downloaded hub snapshot.

    Raises `ConfigError` when it is neither a folder nor to be had from the hub.
    """
    if path.startswith(EMBEDDED):
        folder = Path(str(resources.files("rlsc_mcore") / "assets" / path.removeprefix(EMBEDDED)))
        if not folder.is_dir():
            raise ConfigError(f"model.path: no embedded model {path.removeprefix(EMBEDDED)!r}; expected embedded:tiny_qwen2")
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path: no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except Exception as error:  # offline, unknown name, no permission: all mean the same to the user
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.path: {path} is no local folder and could not be fetched from the hub: {reason}") from None


def load_tokenizer(folder: Path, model: ModelConfig) -> Any:
    """Load the tokenizer of a model folder; raises `ConfigError` when there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model.path: {folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"model.path: the tokenizer of {folder} does not load: {str(error).splitlines()[0]}") from None


def check_vocabulary(tokenizer: Any, architecture: Architecture, folder: Path) -> None:
    """Raise `ConfigError` when the tokenizer can produce an id that has no embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= architecture.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer of {folder} has ids up to {largest}, but config.json says vocab_size = {architecture.vocab_size}"
        )


class SafetensorsFolder:
    """Random access to the tensors of a folder's safetensors files, one slice at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the files' headers; raises `ConfigError` when there are none or one is damaged."""
        files = sorted(folder.glob("*.safetensors"))
        if (folder / INDEX_FILE).is_file():
            try:
                index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
                files = [folder / name for name in sorted(set(index["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{folder / INDEX_FILE}: not an index of safetensors files: {error!r}") from None
        if not files:
            hint = "; only safetensors are read, pickled *.bin files are refused" if list(folder.glob("*.bin")) else ""
            raise ConfigError(f"model.path: {folder} has no *.safetensors weights{hint}")
        self.folder = folder
        self._file_of: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                raise ConfigError(f"model.path: {folder} lacks {file.name}, which its {INDEX_FILE} names")
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ConfigError(f"{file}: not a whole safetensors file: {error}") from None
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        """Read elements [start, stop) along `dim` (0 or 1), or the whole tensor."""
        if dim is None:
            return self._handle(name).get_tensor(name)
        view = self._handle(name).get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise ConfigError(f"model.path: {self.folder} has no tensor {name!r}")
        return self._file_of[name]


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Raise `ConfigError` when the folder has no safetensors, or a tensor is missing or does not fit config.json; reads headers only."""
    weights = SafetensorsFolder(folder)
    for name, expected in hf_shapes(architecture).items():
        if weights.shape(name) != expected:
            raise ConfigError(f"model.path: {folder}: {name} has shape {weights.shape(name)}, config.json says {expected}")


@torch.no_grad()
def load_weights(
    weights: list[BoundWeight],
    architecture: Architecture,
    folder: Path,
    tp_rank: int,
    tp_size: int,
    progress: Callable[[Iterable[BoundWeight]], Iterable[BoundWeight]] = iter,
) -> None:
    """Fill this rank's parameters from `folder`, reading only its slices; no collective.

    Raises `ConfigError` naming tensor and shapes when the folder does not fit its config.json.
    """
    source = SafetensorsFolder(folder)
    for weight in progress(weights):
        for rows, piece in shard_pieces(weight, architecture, source.read, tp_rank, tp_size):
            place = weight.parameter[rows]
            if piece.shape != place.shape:
                raise ConfigError(
                    f"model.path: {folder}: {', '.join(weight.hf)}: rows {rows.start} to {rows.stop} of this rank's part have shape "
                    f"{tuple(piece.shape)}, config.json asks for {tuple(place.shape)}"
                )
            place.copy_(piece)


def write_hf_folder(tensors: Iterable[tuple[str, torch.Tensor]], source: Path, output: Path, *, dtype: str, write: bool) -> None:
    """Write config, tokenizer and safetensors (files of at most 5 GB) to `output`; every rank must iterate `tensors`.

    Only the rank with `write` touches the disk. The folder appears by one rename when it is complete; what an earlier export
    wrote to `output` is replaced then. Raises `ConfigError` where `output` is a folder that this program did not make.
    """
    if not write:
        for _ in tensors:  # the other ranks' part in the collectives that make them
            pass
        return
    check_replaceable(output, field="export to", keep=(source,))
    with replacing(output, "rlsc export") as partial:
        _write_model(tensors, source, partial, dtype)


def _write_model(tensors: Iterable[tuple[str, torch.Tensor]], source: Path, partial: Path, dtype: str) -> None:
    _copy_side_files(source, partial, dtype)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total_bytes = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            save_file(pending, partial / f"shard-{len(shards):05d}", metadata={"format": "pt"})
            shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > MAX_SHARD_BYTES:
            flush()
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total_bytes += size
    flush()
    names = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for number, name in enumerate(names):
        os.replace(partial / f"shard-{number:05d}", partial / name)
    if len(names) > 1:
        weight_map = {tensor: name for name, group in zip(names, shards, strict=True) for tensor in group}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(source: Path, target: Path, dtype: str) -> None:
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
