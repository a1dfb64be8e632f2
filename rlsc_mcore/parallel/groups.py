"""Process groups: the only reader of Megatron's parallel state."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rlsc_mcore.config import ConfigError
from rlsc_mcore.parallel.backend import Backend

# Seconds after which a rank that waits for others gives up, so that a hung rank ends the run; data-parallel ranks wait for
# the one whose answers take longest.
TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S = "RLSC_COLLECTIVE_TIMEOUT_S", 1800.0


@dataclass(frozen=True)
class Groups:
    """This rank's place: world, tensor-parallel and data-parallel rank, size and process group; and its engine's.

    Ranks [i E, (i + 1) E) share engine i of tensor-parallel size E: part of one trainer group, or several of them whole.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    tp_host_group: dist.ProcessGroup  # the tensor-parallel group over gloo: flags from host to host, no device involved
    engine_tp_size: int
    engine_host_group: dist.ProcessGroup  # the ranks of this rank's engine, over gloo
    engines_group: dist.ProcessGroup  # this rank's counterparts in all engines

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def engine_tp_rank(self) -> int:
        """This rank's place inside its engine."""
        return self.rank % self.engine_tp_size

    @property
    def engine_index(self) -> int:
        """Which of the engines this rank belongs to."""
        return self.rank // self.engine_tp_size

    @property
    def num_engines(self) -> int:
        """Engines that answer different questions at the same time."""
        return self.world_size // self.engine_tp_size

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank; collective over the world."""
        return self.max(float(flag)) > 0

    def any_in_tp(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank of the tensor-parallel group; collective over that group, on the host."""
        return flag if self.tp_size == 1 else _any(flag, self.tp_host_group)

    def any_in_engine(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank of this rank's engine; collective over those ranks, on the host."""
        return flag if self.engine_tp_size == 1 else _any(flag, self.engine_host_group)

    def max(self, value: float) -> float:
        """Return the largest `value` over the world; collective over the world."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the data-parallel group in place and return it; collective over that group."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect `value` of every rank in rank order; collective over the world."""
        return _gather_objects(value, None, self.world_size)

    def gather_objects_over_dp(self, value: Any) -> list[Any]:
        """Collect `value` of every data-parallel rank in rank order; collective over that group."""
        return _gather_objects(value, self.dp_group, self.dp_size)

    def gather_objects_over_tp(self, value: Any) -> list[Any]:
        """Collect `value` of every tensor-parallel rank in rank order; collective over that group, on the host."""
        return _gather_objects(value, self.tp_host_group, self.tp_size)

    def gather_objects_over_engines(self, value: Any) -> list[Any]:
        """Collect `value` of this rank's counterpart in every engine, in engine order; collective over those ranks."""
        return _gather_objects(value, self.engines_group, self.num_engines)

    @staticmethod
    def store() -> Any:
        """Return the key-value store that the ranks met at: a note left there is no collective."""
        return dist.distributed_c10d._get_default_store()

    def barrier(self) -> None:
        """Wait for all ranks; collective over the world."""
        if self.world_size > 1:
            dist.barrier()

    @staticmethod
    def _device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def initialize_groups(backend: Backend, tp: int, engine_tp: int | None = None) -> Groups:
    """Join the process group that torchrun (or nobody: one rank) set up, and split it into tp x dp; collective over the world.

    `engine_tp` is the engines' tensor-parallel size, by default `tp`. Without a launcher's environment the process is a world
    of one, without a port or a change to its environment. Raises `ConfigError` when the world size is no multiple of both.
    """
    engine_tp = engine_tp or tp
    assert max(tp, engine_tp) % min(tp, engine_tp) == 0, f"trainer groups of {tp} ranks and engines of {engine_tp} do not nest"
    launched = "RANK" in os.environ
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if launched else 1
    for option, size in (("parallel.tp", tp), ("rollout.tp", engine_tp)):  # before joining: who leaves then breaks the others' joining
        if world_size % size:
            raise ConfigError(f"{option}: {size} does not divide the {world_size} processes that were started")
    if not dist.is_initialized():
        alone = {"rank": 0, "world_size": 1}
        options: dict[str, Any] = {} if launched else {"store": dist.HashStore(), **alone}  # type: ignore[attr-defined, unused-ignore]
        timeout = timedelta(seconds=_timeout_s())
        dist.init_process_group(backend.collectives, timeout=timeout, device_id=backend.device if backend.is_cuda else None, **options)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, distributed_timeout_minutes=_timeout_s() / 60)
    tp_group, dp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    tp_host_group = _blocks_host_group(tp, tp_group)
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=tp_group,
        dp_group=dp_group,
        tp_host_group=tp_host_group,
        engine_tp_size=engine_tp,
        engine_host_group=tp_host_group if engine_tp == tp else _blocks_host_group(engine_tp, None),
        engines_group=dp_group if engine_tp == tp else _counterparts_host_group(engine_tp),
    )


def _any(flag: bool, host_group: dist.ProcessGroup) -> bool:
    tensor = torch.tensor([float(flag)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=host_group)
    return bool(tensor.item())


def _gather_objects(value: Any, group: dist.ProcessGroup | None, size: int) -> list[Any]:
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT_VARIABLE}: expected seconds, more than 0, got {text!r}")
    return seconds


def _blocks_host_group(size: int, existing: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The gloo group of this rank's block of `size` consecutive ranks; `existing` where that will do."""
    if existing is not None and (size == 1 or dist.get_backend(existing) == "gloo"):
        return existing
    return _host_group([list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)])


def _counterparts_host_group(size: int) -> dist.ProcessGroup:
    """The gloo group of the ranks that have this rank's place in their block of `size`."""
    return _host_group([list(range(place, dist.get_world_size(), size)) for place in range(size)])


def _host_group(partition: list[list[int]]) -> dist.ProcessGroup:
    mine: dist.ProcessGroup | None = None
    for ranks in partition:  # every rank takes part in making every group
        made = dist.new_group(ranks, timeout=timedelta(seconds=_timeout_s()), backend="gloo")
        if dist.get_rank() in ranks:
            mine = made
    assert mine is not None
    return mine
