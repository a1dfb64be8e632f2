"""Describe the distributed optimizer's state for checkpoints.

Every rank writes and reads its own slices in place. A data-parallel rank holds a contiguous range of each
flattened parameter shard. That range is described as at most 2 N - 1 boxes of the whole N-dimensional tensor.
So the checkpoint does not depend on the parallel layout, and no rank gathers the state of another rank. The
`fully_reshardable` format of Megatron-Core 0.16.1 has the same keys and shapes, so this module reads its
checkpoints too. That format gathers whole shards on the host of every rank, and it corrupts several padded
buckets.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from rlsc_mcore.training.optimizer import members

MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIX = "optimizer.state"


@dataclass(frozen=True)
class Box:
    """Describe elements [start, stop) of a flattened tensor that form a box of the tensor."""

    start: int
    stop: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Split elements [start, stop) of a row-major tensor of `shape` into boxes, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box(start, stop, (start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        whole_rows = (stop - start) // inner
        if column == 0 and whole_rows:
            yield Box(
                start, start + whole_rows * inner, (row, *(0 for _ in shape[1:])), (whole_rows, *shape[1:])
            )
            start += whole_rows * inner
            continue
        end = min(stop, (row + 1) * inner)
        for part in boxes(shape[1:], column, column + end - start):
            yield Box(
                row * inner + part.start, row * inner + part.stop, (row, *part.offsets), (1, *part.sizes)
            )
        start = end


def sharded_optimizer(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Describe this rank's state of a distributed optimizer, for saving or for loading in place.

    No collective. `model` is the sharded state of the model, whose tensors are the parameters. The tensors of
    the result are views of the optimizer's own tensors.
    """
    places = _places(model)
    return {str(index): _sharded_member(member, places) for index, member in enumerate(members(optimizer))}


def sharded_weights(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Describe the part of the weights that this data-parallel rank saves; no collective.

    That part is the range that its optimizer updates, so all ranks write equal parts. Entries of `model` that
    are not parameters of the optimizer are returned unchanged.
    """
    places = _places(model)
    trained = _all_parameters(members(optimizer))
    parameters = {
        parameter: span for member in members(optimizer) for parameter, span in _local_ranges(member)
    }
    shares: dict[str, Any] = {}
    for name, entry in model.items():
        if entry.data not in trained:
            shares[name] = entry
        elif entry.data in parameters:
            start, stop = parameters[entry.data]
            flat = entry.data.detach().view(-1)[start:stop]
            shares[name] = _pieces(flat, start, places[entry.data], "")
    return shares


def load_groups(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Set the hyperparameters and step counts from `loaded`, whose tensors were already read in place.

    Mutates the optimizer's groups. Raises ValueError if the checkpoint lacks one of the parameter groups.
    """
    for index, member in enumerate(members(optimizer)):
        own = loaded.get(str(index), {})
        # In Megatron's own layout a single optimizer has no index.
        saved = own if "optimizer" in own else loaded
        by_identity = {_identity(group): group for group in saved["optimizer"]["param_groups"]}
        for group in member.optimizer.param_groups:
            if _identity(group) not in by_identity:
                raise ValueError(
                    f"the checkpoint has no parameter group {_identity(group)}; it has {sorted(by_identity)}"
                )
            values = dict(by_identity[_identity(group)])
            step = int(values.pop("step", 0))
            group.update({key: value for key, value in values.items() if key != "params"})
            _set_step(member.optimizer, group, step)


# ------------------------------------------------------------------ the parts


@dataclass(frozen=True)
class _Place:
    """Hold a contiguous range of a flattened parameter and the checkpoint tensor that stores it."""

    start: int
    stop: int
    tensor: ShardedTensor


def _places(model: dict[str, Any]) -> dict[torch.Tensor, list[_Place]]:
    """Map every parameter to its places in the checkpoint.

    A parameter that is saved as several tensors (gate and up) has several places.
    """
    places: dict[torch.Tensor, list[_Place]] = {}
    for entry in nested_values(model):
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)) or not isinstance(
            entry.data, torch.nn.Parameter
        ):
            continue
        tensors = [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))
        found = []
        for tensor in tensors:
            start = tensor.data.storage_offset() - entry.data.storage_offset()
            found.append(_Place(start, start + tensor.data.numel(), tensor))
        found.sort(key=lambda place: place.start)
        covered = sum(place.stop - place.start for place in found)
        contiguous = all(place.tensor.data.is_contiguous() for place in found)
        assert contiguous and covered == entry.data.numel(), (
            f"{entry.key}: its checkpoint tensors are no contiguous parts of it"
        )
        places[entry.data] = found
    return places


def _pieces(flat: torch.Tensor, start: int, places: list[_Place], prefix: str) -> dict[str, ShardedTensor]:
    """Describe `flat` as boxes of the checkpoint tensors of its parameter.

    `flat` holds elements [start, start + len(flat)) of the flattened parameter.
    """
    described: dict[str, ShardedTensor] = {}
    for place in places:
        first, last = max(start, place.start), min(start + flat.numel(), place.stop)
        tensor = place.tensor
        for box in boxes(tuple(tensor.data.shape), first - place.start, last - place.start):
            sizes = (1,) * tensor.prepend_axis_num + box.sizes
            offsets = (0,) * tensor.prepend_axis_num + box.offsets
            begin = place.start + box.start - start
            described[str(len(described))] = ShardedTensor(
                key=prefix + tensor.key,
                data=flat[begin : begin + box.stop - box.start].view(sizes),
                dtype=flat.dtype,
                local_shape=sizes,
                global_shape=tensor.global_shape,
                global_offset=tuple(
                    base + offset for base, offset in zip(tensor.global_offset, offsets, strict=True)
                ),
                axis_fragmentations=None,  # boxes do not form a regular grid
                replica_id=_own_replica(tensor.replica_id),
                allow_shape_mismatch=tensor.allow_shape_mismatch,
            )
    return described


def _own_replica(replica_id: Any) -> Any:
    """Remove the data-parallel part of a replica id, because one data-parallel rank holds a range."""
    return (*replica_id[:-1], 0) if isinstance(replica_id, tuple) else replica_id


def _local_ranges(member: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """Yield each parameter of which this rank holds a range, with the range in the flattened parameter."""
    for by_dtype in member.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def _all_parameters(optimizers: list[Any]) -> set[torch.Tensor]:
    return {parameter for member in optimizers for buffer in member.buffers for parameter in buffer.params}


def _sharded_member(member: Any, places: dict[torch.Tensor, list[_Place]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for number, (parameter, (start, _)) in enumerate(_local_ranges(member)):
        for name, flat in _local_state(member, parameter).items():
            tensors[f"{number}.{name}"] = _pieces(
                flat.detach().view(-1), start, places[parameter], f"{PREFIX}.{name}."
            )
    step = _step(member.optimizer)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"step": step}
        for group in member.optimizer.param_groups
    ]
    return {"optimizer": {"param_groups": groups}, "param_state": tensors}


def _local_state(member: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return this rank's flat master weights and moments of a parameter.

    They are the optimizer's own tensors in their own data types.
    """
    group, order = member.model_param_group_index_map[parameter]
    key = member.optimizer.param_groups[group]["params"][order]
    state = member.optimizer.state[key]
    return {"param": state.get("master_param", key), **{name: state[name] for name in MOMENTS}}


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in param_group_identifier_keys)


def _step(inner: Any) -> int:
    """Return the number of updates that Adam's bias correction uses."""
    if isinstance(inner, HybridDeviceOptimizer):
        counts = [
            int(state["step"])
            for sub in inner.cpu_optimizers
            for state in sub.state.values()
            if "step" in state
        ]
        counts += [int(group.get("step", 0)) for group in getattr(inner.gpu_optimizer, "param_groups", [])]
    else:
        # The count of a group may lag on a rank that holds no elements of that group.
        counts = [int(group.get("step", 0)) for group in inner.param_groups]
    return max(counts, default=0)


def _set_step(inner: Any, group: dict[str, Any], step: int) -> None:
    if not isinstance(inner, HybridDeviceOptimizer):
        group["step"] = step
        return
    # Before every update the hybrid optimizer copies the values of its own group to the GPU optimizer, so
    # that group must not contain "step".
    group.pop("step", None)
    for sub in inner.cpu_optimizers:
        for state in sub.state.values():
            state["step"].fill_(step)
    for sub_group in getattr(inner.gpu_optimizer, "param_groups", []):
        sub_group["step"] = step
