"""Create the process groups and wrap their collectives; no other module reads Megatron's parallel state."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rlsc_mcore.config import ConfigError
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.messages import decode, encode
from rlsc_mcore.parallel.rendezvous import DEFAULT_TIMEOUT_S as DEFAULT_RENDEZVOUS_S
from rlsc_mcore.parallel.rendezvous import TIMEOUT_VARIABLE as RENDEZVOUS_VARIABLE
from rlsc_mcore.parallel.rendezvous import is_launched, meet
from rlsc_mcore.parallel.watchdog import seconds_from_environment

# Seconds after which a collective fails, so that a hung rank ends the run. Data-parallel ranks wait this long
# for the rank whose answers take longest.
TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S = "RLSC_COLLECTIVE_TIMEOUT_S", 1800.0
_host_groups: dict[
    tuple[int, tuple[int, ...]], dist.ProcessGroup
] = {}  # groups of this process, by its world and the ranks


@dataclass(frozen=True)
class Groups:
    """Hold ranks, sizes and process groups of this rank's tensor, pipeline and data parallelism and engine.

    Ranks are numbered tensor-parallel first, then data-parallel, then by pipeline stage (Megatron's order),
    so the ranks of a tensor-parallel group are consecutive. Ranks [i E, (i + 1) E) share engine i of
    tensor-parallel size E: they are a part of one tensor-parallel group, or several whole groups. The model
    group contains the ranks that together hold one copy of the trainer's weights: P stages of T ranks, member
    `pp_rank * T + tp_rank`.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup  # the stages with this rank's tensor-parallel rank, first stage first
    model_group: (
        dist.ProcessGroup
    )  # the ranks that together hold one copy of the trainer's weights, in member order
    model_host_group: dist.ProcessGroup  # the same ranks over gloo, for values on the host
    engine_tp_size: int
    engine_host_group: dist.ProcessGroup  # the ranks of this rank's engine, over gloo
    engines_group: dist.ProcessGroup  # the ranks with this rank's index in each engine, over gloo

    @property
    def is_main(self) -> bool:
        """Return True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def member(self) -> int:
        """Return this rank's index in its model group."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def is_last_stage(self) -> bool:
        """Return True on the ranks that hold the output head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def engine_tp_rank(self) -> int:
        """Return this rank's index in its engine."""
        return self.rank % self.engine_tp_size

    @property
    def engine_index(self) -> int:
        """Return the index of this rank's engine."""
        return self.rank // self.engine_tp_size

    @property
    def num_engines(self) -> int:
        """Return the number of engines, which sample at the same time."""
        return self.world_size // self.engine_tp_size

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank; collective over the world."""
        return self.max(float(flag)) > 0

    def any_in_model(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank of the model group.

        Collective over that group, on the host.
        """
        return flag if self.tp_size * self.pp_size == 1 else _any(flag, self.model_host_group)

    def any_in_engine(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank of this rank's engine.

        Collective over its ranks, on the host.
        """
        return flag if self.engine_tp_size == 1 else _any(flag, self.engine_host_group)

    def max(self, value: float) -> float:
        """Return the maximum of `value` over all ranks; collective over the world."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def sums_over_engines(self, values: Sequence[float]) -> list[float]:
        """Sum each of `values` over all engines, one rank of each.

        Collective over `engines_group`, on the host.
        """
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.num_engines > 1:
            dist.all_reduce(tensor, group=self.engines_group)
        return tensor.tolist()

    def reduce_over_dp(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce a host tensor over the data-parallel group and return the result on the host.

        Collective over that group.
        """
        if self.dp_size == 1:
            return tensor
        on_device = tensor.to(self._device(), copy=True)
        dist.all_reduce(on_device, op=op, group=self.dp_group)
        return on_device.cpu()

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the data-parallel group in place and return it; collective over that group."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather `value` from all ranks in rank order; collective over the world."""
        return _gather_objects(value, None, self.world_size)

    def gather_objects_over_dp(self, value: Any) -> list[Any]:
        """Gather `value` from all data-parallel ranks in rank order; collective over that group."""
        return _gather_objects(value, self.dp_group, self.dp_size)

    def gather_objects_over_model(self, value: Any) -> list[Any]:
        """Gather `value` from the model group in member order; collective over that group, on the host."""
        return _gather_objects(value, self.model_host_group, self.tp_size * self.pp_size)

    def from_last_stage(self, value: Any) -> Any:
        """Return the last pipeline stage's `value` on every stage; collective over the pipeline group.

        The `value` of other stages is ignored. A tensor must have the same shape and type on every stage and
        is written in place. Any other value is sent in the encoding of `parallel.messages`.
        """
        if self.pp_size == 1:
            return value
        source = dist.get_process_group_ranks(self.pp_group)[-1]
        if isinstance(value, torch.Tensor):
            dist.broadcast(value, src=source, group=self.pp_group)
            return value
        content = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(self._device())
        length = torch.tensor([content.numel()], dtype=torch.int64, device=self._device())
        dist.broadcast(length, src=source, group=self.pp_group)
        if not self.is_last_stage:
            content = torch.empty(int(length), dtype=torch.uint8, device=self._device())
        dist.broadcast(content, src=source, group=self.pp_group)
        return decode(content.cpu().numpy().tobytes())

    def model_ranks(self, dp_rank: int) -> list[int]:
        """Return the ranks of the model group of data-parallel rank `dp_rank`, in member order."""
        per_stage = self.world_size // self.pp_size
        return [
            stage * per_stage + dp_rank * self.tp_size + place
            for stage in range(self.pp_size)
            for place in range(self.tp_size)
        ]

    def gather_tables_over_engines(self, table: torch.Tensor) -> list[torch.Tensor]:
        """Gather host tables [rows, columns] over `engines_group`, in engine order.

        The numbers of rows may differ. Collective over that group, on the host.
        """
        if self.num_engines == 1:
            return [table]
        counts = torch.zeros(self.num_engines, dtype=torch.int64)
        dist.all_gather_into_tensor(counts, torch.tensor([len(table)]), group=self.engines_group)
        longest = int(counts.max())
        padded = torch.zeros(longest, table.shape[1], dtype=table.dtype)
        padded[: len(table)] = table
        gathered = torch.empty(self.num_engines * longest, table.shape[1], dtype=table.dtype)
        if longest:
            dist.all_gather_into_tensor(gathered, padded, group=self.engines_group)
        return [gathered[engine * longest :][:count] for engine, count in enumerate(counts.tolist())]

    def exchange_objects_over_engines(self, parts: Sequence[Any]) -> list[Any]:
        """Send `parts[i]` to this rank's counterpart in engine i; return the parts received, in engine order.

        Collective over `engines_group`, on the host.
        """
        if self.num_engines == 1:
            return list(parts)
        blobs = [torch.frombuffer(bytearray(encode(part)), dtype=torch.uint8) for part in parts]
        sizes, theirs = (
            torch.tensor([len(blob) for blob in blobs]),
            torch.zeros(self.num_engines, dtype=torch.int64),
        )
        dist.all_to_all_single(theirs, sizes, group=self.engines_group)
        received = torch.empty(int(theirs.sum()), dtype=torch.uint8)
        dist.all_to_all_single(
            received, torch.cat(blobs), theirs.tolist(), sizes.tolist(), group=self.engines_group
        )
        return [decode(part.numpy().tobytes()) for part in received.split(theirs.tolist())]

    def exchange_over_world(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send host tensor `parts[r]` (int32) to rank r; return the `sizes[r]` elements it sent.

        Collective over the world.
        """
        device = self._device()
        received = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        dist.all_to_all_single(
            received, torch.cat(list(parts)).to(device), list(sizes), [len(part) for part in parts]
        )
        return list(received.cpu().split(list(sizes)))

    def gather_objects_over_engines(self, value: Any) -> list[Any]:
        """Gather `value` in engine order; collective over `engines_group`."""
        return _gather_objects(value, self.engines_group, self.num_engines)

    @staticmethod
    def store() -> Any:
        """Return the rendezvous store (key-value); reading and writing it is no collective."""
        return dist.distributed_c10d._get_default_store()

    def barrier(self) -> None:
        """Wait for all ranks; collective over the world."""
        if self.world_size > 1:
            dist.barrier()

    @staticmethod
    def _device() -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )


def initialize_groups(backend: Backend, tp: int, engine_tp: int | None = None, *, pp: int = 1) -> Groups:
    """Initialise the process group and split it into tp x dp x pp; collective over the world.

    `engine_tp` is the engines' tensor-parallel size, by default `tp`. Without a launcher's environment the
    world has one rank. On one node every socket is on the loopback interface (`rendezvous.use_loopback`).
    Raises `ConfigError` if the world size is not a multiple of tp x pp and of `engine_tp`, and `RunError` if
    ranks are missing.
    """
    engine_tp = engine_tp or tp
    assert max(tp, engine_tp) % min(tp, engine_tp) == 0, (
        f"trainer groups of {tp} ranks and engines of {engine_tp} do not nest"
    )
    world_size = dist.get_world_size() if dist.is_initialized() else world_size_of_launcher()
    sizes = [("parallel.tp", tp, f"{tp} does"), ("rollout.tp", engine_tp, f"{engine_tp} does")]
    if pp > 1:
        sizes.insert(1, ("parallel.pp", tp * pp, f"parallel.tp {tp} x parallel.pp {pp} = {tp * pp} do"))
    for option, size, subject in sizes:  # before joining: a rank that leaves later breaks the rendezvous
        if world_size % size:
            raise ConfigError(f"{option}: {subject} not divide the {world_size} processes that were started")
    if not dist.is_initialized():
        timeout = timedelta(seconds=_timeout_s())
        store, rank, world = meet(
            seconds_from_environment(RENDEZVOUS_VARIABLE, DEFAULT_RENDEZVOUS_S), needs_address=backend.is_cuda
        )
        store.set_timeout(
            timeout
        )  # groups use the store later, and ranks reach that point at very different times
        device = backend.device if backend.is_cuda else None
        dist.init_process_group(
            backend.collectives, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device
        )
    # Must precede Megatron's groups: see `_host_group`.
    model_host_group, engine_host_group, engines_group = _make_host_groups(world_size, tp, pp, engine_tp)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            distributed_timeout_minutes=_timeout_s() / 60,
            create_gloo_process_groups=False,  # no collective runs over the data-parallel ranks' hosts
        )
    dp_group, model_group = (
        parallel_state.get_data_parallel_group(),
        parallel_state.get_model_parallel_group(),
    )
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=dp_group,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        model_group=model_group,
        model_host_group=model_host_group or model_group,
        engine_tp_size=engine_tp,
        engine_host_group=engine_host_group or model_host_group or model_group,
        engines_group=engines_group or dp_group,
    )


def _any(flag: bool, host_group: dist.ProcessGroup) -> bool:
    tensor = torch.tensor([float(flag)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=host_group)
    return bool(tensor.item())


def _gather_objects(value: Any, group: dist.ProcessGroup | None, size: int) -> list[Any]:
    if size == 1:
        return [value]
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    content = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(device)
    length = torch.tensor([content.numel()], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    longest = max(int(each) for each in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: content.numel()] = content
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [
        decode(part[: int(each)].cpu().numpy().tobytes()) for part, each in zip(parts, lengths, strict=True)
    ]


def world_size_of_launcher() -> int:
    """Return the number of ranks that the launcher reports, 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "") if is_launched() else "1"
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ConfigError(
            f"WORLD_SIZE: expected a number of processes, at least 1, got {text!r}; torchrun sets it"
        )
    return int(text)


def _timeout_s() -> float:
    return seconds_from_environment(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)


def _make_host_groups(world_size: int, tp: int, pp: int, engine_tp: int) -> list[dist.ProcessGroup | None]:
    """Create this rank's gloo groups: its model group, its engine, its counterparts in all engines.

    An entry is None if another group serves instead: Megatron's group of the same ranks if it uses gloo, the
    model group for an engine of the same ranks, and Megatron's model group if it has one rank.
    """
    rank, per_stage = dist.get_rank(), world_size // pp
    first = rank % per_stage // tp * tp
    model = [stage * per_stage + first + place for stage in range(pp) for place in range(tp)]
    data_parallel = [rank // per_stage * per_stage + place for place in range(rank % tp, per_stage, tp)]
    engine = [rank // engine_tp * engine_tp + place for place in range(engine_tp)]
    counterparts = list(range(rank % engine_tp, world_size, engine_tp))
    is_gloo = dist.get_backend() == "gloo"
    return [
        None if is_gloo or len(model) == 1 else _host_group(model),
        None if engine == model else _host_group(engine),
        None if is_gloo and counterparts == data_parallel else _host_group(counterparts),
    ]


def _host_group(ranks: list[int]) -> dist.ProcessGroup:
    """Return the gloo group of `ranks`, which include this rank.

    Collective over those ranks on the first call. torch derives the name of such a group from its ranks and
    from the number of groups that this rank is in, so that number must be equal on all of them. It is equal
    before Megatron's groups exist. Afterwards the stages of a pipeline are in different numbers of groups.
    """
    key = (id(dist.group.WORLD), tuple(ranks))
    if key not in _host_groups:
        timeout = timedelta(seconds=_timeout_s())
        made = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)  # torch returns another type outside the group
        _host_groups[key] = made
    return _host_groups[key]
