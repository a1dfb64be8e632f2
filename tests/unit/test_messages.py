"""What ranks send each other: data comes back as it was, and nothing else is built from it."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.evaluation.records import AnswerRecord
from rlsc_mcore.parallel.messages import DataUnpickler, decode, encode, from_json, to_json
from rlsc_mcore.types import Rollout

ROLLOUT = Rollout(1, 0, (5, 6), (7, 8, 9), (-0.1, -1e-300, -0.0), "stop", 3, "a \ud83d half")
VALUES = [
    None, True, 3, -(2**40), 2**63, 0.1, float("inf"), "", "größer\n", b"\0\xff", [], (), {}, [1, 2.5], (1, "a", None), [[1], (2,)],
    {"a": {0.5: (1,)}, 3: [True]}, {(0, 1): "x"}, Path("/a/b"), [ROLLOUT],
    {"answers": [AnswerRecord(0, 0.5, 1, "g", "t", None, True, True, False, False, 4, None)]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    for restored in (
        (decode(encode(value)), from_json(to_json(value))) if value != b"\0\xff" else (decode(encode(value)),)
    ):
        assert restored == value and type(restored) is type(value) and repr(restored) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_tensors_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    for restored in (decode(encode([tensor]))[0], from_json(to_json([tensor]))[0]):
        assert restored.dtype == dtype and restored.shape == tensor.shape and torch.equal(restored, tensor)


def test_a_shape_without_content_comes_back() -> None:
    (restored,) = decode(encode([torch.empty(2, 3, dtype=torch.bfloat16, device="meta")]))
    assert restored.is_meta and restored.shape == (2, 3) and restored.dtype == torch.bfloat16


def test_nan_and_bits_of_floats() -> None:
    values = [*torch.randn(100, dtype=torch.float64).tolist(), float("nan")]
    restored = decode(encode(values))
    assert restored[:-1] == values[:-1] and restored[-1] != restored[-1]


@pytest.mark.parametrize(
    "value", [os.getcwd, object(), {1, 2}, pytest], ids=lambda value: type(value).__name__
)
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is not sent between ranks"):
        encode(value)


@pytest.mark.parametrize(
    "kind",
    [["os", "system", {"command": "true"}], ["rlsc_mcore.cli", "main", {}], ["rlsc_mcore.cli", "os.system", {}],
     ["rlsc_mcore.parallel.messages", "DataUnpickler", {}], ["subprocess", "Popen", {"args": "true"}]],
)  # fmt: skip
def test_only_dataclasses_of_this_package_are_built(kind: list[Any]) -> None:
    import msgspec

    with pytest.raises((ValueError, AttributeError)):
        decode(msgspec.msgpack.encode({"dataclass": kind}))


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.mkdir, eval, exec, __import__, getattr, torch.load, pickle.loads],
    ids=lambda value: value.__name__,
)
def test_a_pickle_of_code_is_refused(tmp_path: Path, function: Any) -> None:
    import io

    with pytest.raises(pickle.UnpicklingError, match="is not data"):
        DataUnpickler(io.BytesIO(pickle.dumps(_Runs(function, str(tmp_path / "witness"))))).load()
    assert not (tmp_path / "witness").exists()


def test_members_of_enums_are_read_as_every_python_pickles_them() -> None:
    """Python 3.11.2 of Debian 12 pickles a member as getattr(class, name)."""
    import io

    from torch.distributed.checkpoint.planner import WriteItemType

    for call in ((getattr, WriteItemType, "SHARD"), (WriteItemType, WriteItemType.SHARD.value)):
        assert DataUnpickler(io.BytesIO(pickle.dumps(_Runs(*call)))).load() is WriteItemType.SHARD
    for arguments in (
        (WriteItemType, "__class__"),
        (WriteItemType, "mro"),
        (WriteItemType.SHARD, "name"),
        (torch.Size([1]), "numel"),
        (WriteItemType, "SHARD", None),
    ):
        with pytest.raises(pickle.UnpicklingError, match="is not data"):
            DataUnpickler(io.BytesIO(pickle.dumps(_Runs(getattr, *arguments)))).load()


def test_a_pickle_of_a_checkpoint_s_layout_is_read() -> None:
    import io

    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    item = WriteItem(index=MetadataIndex("weight", torch.Size([0]), 0), type=WriteItemType.SHARD)
    values = [
        item,
        ChunkStorageMetadata(torch.Size([0]), torch.Size([4])),
        torch.bfloat16,
        {"a": (1, torch.arange(3))},
        OSError(28, "full"),
    ]
    restored = DataUnpickler(io.BytesIO(pickle.dumps(values))).load()
    assert (
        restored[:3] == values[:3]
        and torch.equal(restored[3]["a"][1], torch.arange(3))
        and restored[4].errno == 28
    )
