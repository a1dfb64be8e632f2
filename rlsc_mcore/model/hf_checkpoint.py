"""Find, check, read and write Hugging Face model folders."""

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
from rlsc_mcore.model.shape import HUB_FILES, Architecture
from rlsc_mcore.model.weight_map import BoundWeight, hf_shapes, shard_pieces
from rlsc_mcore.run.made_here import check_replaceable, replacing

EMBEDDED = "embedded:"
EMBEDDED_MODELS = ("tiny_qwen2", "three_modes")
MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
COMPARED_ROWS = 4096  # rows of two vocabulary tensors compared at a time
# The files that transformers and vLLM need in addition to the weights.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MORE_TEMPLATES = "additional_chat_templates"


def resolve_model_folder(path: str) -> Path:
    """Return the local folder of `model.path`: the folder itself, an embedded asset, or a downloaded hub
    snapshot.

    Raises `ConfigError` if it is not a folder and cannot be downloaded from the hub.
    """
    if path.startswith(EMBEDDED):
        folder = Path(str(resources.files("rlsc_mcore") / "assets" / path.removeprefix(EMBEDDED)))
        if path.removeprefix(EMBEDDED) not in EMBEDDED_MODELS:
            raise ConfigError(
                f"model.path: no embedded model {path.removeprefix(EMBEDDED)!r}; expected "
                f"{' or '.join(EMBEDDED + name for name in EMBEDDED_MODELS)}"
            )
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path: no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # offline, unknown name or no permission; the user gets one message for all
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path: {path} is no local folder and could not be fetched from the hub: {reason}"
        ) from None


def load_tokenizer(folder: Path, model: ModelConfig) -> Any:
    """Load the tokenizer of a model folder; raises `ConfigError` if there is none or it does not load."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"model.path: {folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
        )
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ConfigError(
            f"model.path: the tokenizer of {folder} does not load: {str(error).splitlines()[0]}"
        ) from None


def check_vocabulary(tokenizer: Any, architecture: Architecture, folder: Path) -> None:
    """Raise `ConfigError` if the tokenizer can produce an id without an embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= architecture.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer of {folder} has ids up to {largest}, but config.json says vocab_size "
            f"= {architecture.vocab_size}"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads from `folder`.

    These are the file that config.json names as `transformers_weights`, else model.safetensors, else the
    files of the index. Other safetensors files in the folder are not part of the model. Raises `ConfigError`
    if there are none, if the index is damaged or names a file outside the folder, or if the folder holds an
    adapter instead of a whole model.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"model.path: {folder} holds an adapter ({ADAPTER_CONFIG}); expected whole weights: merge it "
            "into its base "
            "model, or remove the adapter's files"
        )
    first = folder / (_named_weights(folder) or WEIGHTS_FILE)
    if first.is_file() and not first.name.endswith(".index.json"):
        return [first]
    index_file = first if first.name.endswith(".index.json") else folder / INDEX_FILE
    if index_file.is_file():
        return _indexed_files(folder, index_file)
    if list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {folder} has neither {first.name} nor {INDEX_FILE}, without which transformers "
            "reads no "
            "*.safetensors file; rename a single file, or bring the index of several"
        )
    hint = (
        "; only safetensors are read, pickled *.bin files are refused" if list(folder.glob("*.bin")) else ""
    )
    raise ConfigError(f"model.path: {folder} has no *.safetensors weights{hint}")


def left_over_weights(folder: Path) -> list[str]:
    """Return the names of the safetensors files (and an index) in `folder` that are not read, for a
    warning."""
    names = {file.name for file in folder.glob("*.safetensors")}
    names -= {file.name for file in weight_files(folder)}
    single = (folder / WEIGHTS_FILE).is_file() and not _named_weights(folder)
    return sorted(names | ({INDEX_FILE} if single and (folder / INDEX_FILE).is_file() else set()))


def _named_weights(folder: Path) -> str | None:
    """Return `transformers_weights` of config.json, the file that transformers reads instead of its default
    names; None if not set."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    if Path(str(name)).name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"{folder / 'config.json'}: transformers_weights: expected a safetensors file of the folder, got "
            f"{name!r}"
        )
    if not (folder / name).is_file():
        raise ConfigError(f"{folder / 'config.json'}: transformers_weights: {folder} lacks {name}")
    return str(name)


def _indexed_files(folder: Path, index_file: Path) -> list[Path]:
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        outside = next((name for name in names if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index_file}: not an index of safetensors files: {error!r}") from None
    if not names:
        raise ConfigError(f"{index_file}: not an index of safetensors files: it names none")
    if outside is not None:
        raise ConfigError(f"{index_file}: expected names of files in its folder, got {outside!r}")
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"model.path: {folder} lacks {name}, which its {index_file.name} names")
    return [folder / name for name in names]


class SafetensorsFolder:
    """Random access to the tensors of a folder's safetensors files, one slice at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the headers of `weight_files`; raises `ConfigError` if a file is damaged or a tensor is in two
        files."""
        self.folder = folder
        self._file_of: dict[str, Any] = {}
        place_of: dict[str, str] = {}
        for file in weight_files(folder):
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ConfigError(f"{file}: not a whole safetensors file: {error}") from None
            for name in handle.keys():  # noqa: SIM118  # no mapping
                if name in place_of:
                    raise ConfigError(
                        f"model.path: {folder}: tensor {name!r} is in {place_of[name]} and in {file.name}; "
                        "keep one of them"
                    )
                place_of[name] = file.name
                self._file_of[name] = handle

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype from the header, in safetensors' spelling (`BF16`)."""
        return str(self._handle(name).get_slice(name).get_dtype())

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
    """Raise `ConfigError` if the folder's weights do not match its config.json.

    Errors are: no safetensors, a tensor that is missing, has another shape or is quantized, and a tied model
    with an output layer that differs from the embedding. Reads headers only, plus both vocabulary tensors if
    a tied model has two.
    """
    weights = SafetensorsFolder(folder)
    for name, expected in hf_shapes(architecture).items():
        if name == HEAD and name not in weights:
            raise ConfigError(
                f"model.path: {folder} has no tensor {HEAD!r} and its config.json does not say "
                "tie_word_embeddings: true; "
                "set it if the output layer is the embedding"
            )
        if weights.shape(name) != expected:
            raise ConfigError(
                f"model.path: {folder}: {name} has shape {weights.shape(name)}, config.json says {expected}"
            )
        if weights.dtype(name) not in FLOAT_TYPES:
            raise ConfigError(
                f"model.path: {folder}: {name} is stored as {weights.dtype(name)}; expected one of "
                f"{', '.join(FLOAT_TYPES)}: "
                "quantized weights are not read, bring the model they were made from"
            )
    if architecture.tied_embeddings and HEAD in weights:
        _check_tied_head(weights, architecture)


def _check_tied_head(weights: SafetensorsFolder, architecture: Architecture) -> None:
    """Raise `ConfigError` if the output layer of a tied model is not a copy of the embedding; transformers
    accepts a copy."""
    same = weights.shape(HEAD) == weights.shape(EMBEDDING)
    for start in range(0, architecture.vocab_size if same else 0, COMPARED_ROWS):
        rows = (0, start, min(start + COMPARED_ROWS, architecture.vocab_size))
        same = same and torch.equal(weights.read(HEAD, *rows).float(), weights.read(EMBEDDING, *rows).float())
    if not same:
        raise ConfigError(
            f"model.path: {weights.folder}: {HEAD} is not equal to {EMBEDDING}, but config.json says "
            "tie_word_embeddings: "
            f"true; set it to false to train both, or remove {HEAD}"
        )


@torch.no_grad()
def load_weights(
    weights: list[BoundWeight],
    architecture: Architecture,
    folder: Path,
    tp_rank: int,
    tp_size: int,
    progress: Callable[[Iterable[BoundWeight]], Iterable[BoundWeight]] = iter,
) -> None:
    """Load this rank's parameters from `folder`, reading only its own slices; no collective.

    Raises `ConfigError` naming tensor and shapes if the folder does not match its config.json.
    """
    source = SafetensorsFolder(folder)
    for weight in progress(weights):
        for rows, piece in shard_pieces(weight, architecture, source.read, tp_rank, tp_size):
            place = weight.parameter[rows]
            if piece.shape != place.shape:
                raise ConfigError(
                    f"model.path: {folder}: {', '.join(weight.hf)}: rows {rows.start} to {rows.stop} of this "
                    "rank's part have shape "
                    f"{tuple(piece.shape)}, config.json asks for {tuple(place.shape)}"
                )
            place.copy_(piece)


def write_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]], source: Path, output: Path, *, dtype: str, write: bool
) -> None:
    """Write config, tokenizer and safetensors (files of at most 5 GB) to `output`; every rank must iterate
    `tensors`.

    Only the rank with `write` accesses the disk. The folder appears by one rename when it is complete and
    replaces an earlier export in `output`. Raises `ConfigError` if `output` is a folder that this program did
    not create.
    """
    if not write:
        for _ in tensors:  # take part in the collectives that produce the tensors
            pass
        return
    check_replaceable(output, field="export to", keep=(source,))
    with replacing(output, "rlsc export") as partial:
        _write_model(tensors, source, partial, dtype)


def _write_model(
    tensors: Iterable[tuple[str, torch.Tensor]], source: Path, partial: Path, dtype: str
) -> None:
    _copy_side_files(source, partial, dtype)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total_bytes = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            file = partial / f"shard-{len(shards):05d}"
            save_file(pending, file, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(partial / "config.json", file)
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
        [WEIGHTS_FILE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
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
    for file in [
        *source.glob("*.py"),
        *source.glob(f"{MORE_TEMPLATES}/*.jinja"),
    ]:  # code of the tokenizer, named templates
        (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(source))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
