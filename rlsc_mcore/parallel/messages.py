"""Send values between ranks as msgpack: containers, numbers, text, tensors and this package's dataclasses.

Pickle is not used: anyone who reaches a rank's port could send a pickle that runs code. Libraries also use
pickle (Megatron-Core exchanges the layout of a checkpoint with it): `restrict_unpickling` limits torch's
object collectives to types that hold data.
"""

import base64
import dataclasses
import importlib
import io
import json
import pickle
import sys
from enum import Enum
from pathlib import PurePath
from typing import Any

import msgspec
import torch

_OWN = "rlsc_mcore."
_ATOMS = {int, float, bool, str, bytes, type(None)}
_TUPLE, _LIST, _MAP, _DATACLASS, _TENSOR, _PATH, _TEXT = (
    "tuple",
    "list",
    "map",
    "dataclass",
    "tensor",
    "path",
    "text",
)
# Modules whose classes describe data: those of Megatron-Core's and torch's checkpoint formats,
# and the handles of vLLM's shared memory.
_DATA_MODULES = (
    "megatron.core.dist_checkpointing.",
    "torch.distributed.checkpoint.",
    "torch.distributed._shard.",
    "vllm.distributed.",
)
_DATA_GLOBALS = {
    ("builtins", name)
    for name in (
        "set",
        "frozenset",
        "slice",
        "range",
        "complex",
        "bytearray",
        "object",
        "tuple",
        "list",
        "dict",
        "str",
        "int",
        "float",
    )
} | {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("traceback", "StackSummary"),
    ("traceback", "FrameSummary"),
}


def encode(value: Any) -> bytes:
    """Encode `value` as msgpack; raises TypeError for a type that is not data."""
    try:
        return msgspec.msgpack.encode(_plain(value))
    except (UnicodeEncodeError, ValueError):  # an answer may hold half of a surrogate pair
        return msgspec.msgpack.encode(_plain(value, escapes=True))


def decode(content: bytes) -> Any:
    """Return the value that `encode` received.

    Creates only containers, numbers, text, tensors and dataclasses of this package.
    """
    return _restored(msgspec.msgpack.decode(content))


def to_json(value: Any) -> str:
    """Encode `value` as JSON text; raises TypeError for a type that is not data."""
    return json.dumps(
        _plain(value), default=lambda content: base64.b64encode(content).decode("ascii"), indent=1
    )


def from_json(text: str) -> Any:
    """Return the value that `to_json` received; raises ValueError for other text."""
    try:
        return _restored(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a value of this program: {error!r}") from None


def _plain(value: Any, *, escapes: bool = False) -> Any:
    """Convert `value` to types that msgpack and JSON support; other types become `{kind: content}`."""
    kind = type(value)
    if kind is str and escapes:
        return {_TEXT: value.encode("utf-8", "surrogatepass")}
    if kind in _ATOMS:
        return value
    if kind in (list, tuple):
        tag = _TUPLE if kind is tuple else _LIST
        if set(map(type, value)) <= {
            int,
            float,
        }:  # fast path for long lists of tokens and log-probs
            return {tag: list(value)}
        return {tag: [_plain(item, escapes=escapes) for item in value]}
    if kind is dict:
        return {
            _MAP: [
                [_plain(key, escapes=escapes), _plain(item, escapes=escapes)] for key, item in value.items()
            ]
        }
    if isinstance(value, torch.Tensor):
        if value.is_meta:  # a shape without content
            return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), None]}
        data = value.detach().cpu().contiguous()
        content = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return {_TENSOR: [str(data.dtype).removeprefix("torch."), list(data.shape), content]}
    if isinstance(value, PurePath):
        return {_PATH: str(value)}
    if dataclasses.is_dataclass(value) and kind.__module__.startswith(_OWN):
        fields = {
            entry.name: _plain(getattr(value, entry.name), escapes=escapes)
            for entry in dataclasses.fields(value)
        }
        return {_DATACLASS: [kind.__module__, kind.__qualname__, fields]}
    if kind.__module__ == "numpy" and hasattr(value, "item"):
        return value.item()
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} is not sent between ranks: convert it to numbers, text or a "
        "dataclass"
    )


def _restored(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in (_TUPLE, _LIST):
        items = (
            content
            if not any(isinstance(item, dict) for item in content)
            else [_restored(item) for item in content]
        )
        return tuple(items) if kind == _TUPLE else list(items)
    if kind == _MAP:
        return {_restored(key): _restored(item) for key, item in content}
    if kind == _TENSOR:
        return _tensor(*content)
    if kind == _PATH:
        from pathlib import Path

        return Path(content)
    if kind == _TEXT:
        return content.decode("utf-8", "surrogatepass")
    if kind == _DATACLASS:
        return _dataclass(*content)
    raise ValueError(f"unknown kind {kind!r}")


def _tensor(dtype: str, shape: list[int], content: bytes | str | None) -> torch.Tensor:
    if content is None:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    data = base64.b64decode(content) if isinstance(content, str) else content
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"no such dtype: {dtype!r}")
    return (
        torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
        if data
        else torch.empty(shape, dtype=kind)
    )


def _dataclass(module: str, name: str, fields: dict[str, Any]) -> Any:
    if not module.startswith(_OWN) or not name.isidentifier():
        raise ValueError(f"not a dataclass of this program: {module}.{name}")
    kind = getattr(sys.modules.get(module) or importlib.import_module(module), name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module):
        raise ValueError(f"not a dataclass of this program: {module}.{name}")
    return kind(**{entry: _restored(item) for entry, item in fields.items()})


class DataUnpickler(pickle.Unpickler):
    """Unpickle only data of checkpoint formats.

    Raises UnpicklingError naming any other global in the pickle.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (
            "builtins",
            "getattr",
        ):  # Python 3.11.2 pickles members of enums by it
            return _enum_member
        if (module, name) in _DATA_GLOBALS:
            return _load_tensor if name == "_load_from_bytes" else super().find_class(module, name)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_data = f"{module}.".startswith(_DATA_MODULES) and "." not in name
        is_error = module == "builtins" and name.endswith(("Error", "Exception"))
        if is_dtype or is_data or is_error:
            found = super().find_class(module, name)
            if is_dtype or (isinstance(found, type) and _describes_data(found)):
                return found
        raise pickle.UnpicklingError(f"names {module}.{name}, which is not data")


def _describes_data(kind: type) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, (Enum, BaseException, tuple))
        or kind.__module__.startswith(_DATA_MODULES[0])
    )


def _enum_member(*arguments: Any) -> Any:
    """Return the member of an enum that `getattr(*arguments)` would return; refuse any other attribute."""
    kind, name = arguments if len(arguments) == 2 else (None, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Enum)
        and isinstance(name, str)
        and name in kind.__members__
    ):
        return kind[name]
    raise pickle.UnpicklingError(f"names the attribute {name!r} of {kind!r}, which is not data")


def _load_tensor(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def restrict_unpickling() -> None:
    """Restrict torch's object collectives to data; call it before the rendezvous.

    Mutates `torch.distributed`.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d._unpickler = DataUnpickler
