"""Emulate a GPU: replace torch.cuda functions, use fake tensors and a fake process group, and record each
step.

Use this only in a separate process (`rlsc_mcore.rehearsal.worker`), which loads the library of fake_cuda.cpp
before torch. Fake tensors have a shape, data type and device but no values. Code that reads a value gets 1,
and the read is recorded.
"""

import collections
import contextlib
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsc_mcore.parallel import groups

DEVICE = torch.device("cuda", 0)
OWN_PACKAGES = ("rlsc_mcore", "megatron")


class _Stream:
    """A stream or an event whose methods return at once."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def nothing(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    wait = wait_stream = wait_event = synchronize = record = nothing

    def record_event(self, *arguments: Any) -> "_Stream":
        return _Stream()

    def query(self) -> bool:
        return True


class Recorder(TorchDispatchMode):
    """Record live and peak bytes by device, reads of values, device-to-host copies, and collectives by
    operation and group."""

    def __init__(self) -> None:
        super().__init__()
        self.live: collections.Counter[str] = collections.Counter()
        self.peak: collections.Counter[str] = collections.Counter()
        self.reads: collections.Counter[str] = collections.Counter()
        self.copies_to_host: collections.Counter[str] = collections.Counter()  # bytes by caller
        self.collectives: collections.Counter[str] = collections.Counter()
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Reset all counters; live bytes are kept, and the peak starts from them."""
        self.peak = self.live.copy()
        for counter in (self.reads, self.copies_to_host, self.collectives):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.reads[_caller()] += 1
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_everything(index) for index in args[1]])
        if func is torch.ops.aten.nonzero.default and args[0].dtype is torch.bool:
            return torch.stack(
                torch.meshgrid(
                    *(torch.arange(n, device=args[0].device) for n in args[0].shape), indexing="ij"
                ),
                -1,
            ).view(-1, args[0].dim())
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        is_from_gpu = source is not None and source.device.type == "cuda"
        if func is torch.ops.aten._to_copy.default and is_from_gpu and str(kwargs.get("device")) == "cpu":
            self.copies_to_host[_caller()] += args[0].nbytes
        if (
            func is torch.ops.aten.copy_.default
            and args[0].device.type == "cpu"
            and args[1].device.type == "cuda"
        ):
            self.copies_to_host[_caller()] += args[1].nbytes
        if func.namespace == "c10d":
            self.collectives[f"{func._opname.strip('_')} over {_group_name(args)}"] += 1
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that a storage is resized in place."""
        key = storage._cdata
        if key in self._sizes:
            self._add("cuda", size - self._sizes[key])
            self._sizes[key] = size

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, device = storage._cdata, tensor.device.type
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._add(device, storage.nbytes())
        weakref.finalize(storage, self._free, key, device)

    def _free(self, key: int, device: str) -> None:
        self._add(device, -self._sizes.pop(key, 0))

    def _add(self, device: str, size: int) -> None:
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])


class _OnDevice(TorchFunctionMode):
    """Treat an integer device as the GPU, and ignore requests for pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if type(kwargs.get("device")) is int:
            kwargs["device"] = DEVICE
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        if func is torch.Tensor.type and kwargs.get("dtype", args[1] if len(args) > 1 else None) is None:
            name = func(args[0]).rpartition(".")[2]
            return f"torch.cuda.{name}" if args[0].device.type == "cuda" else f"torch.{name}"
        return func(*args, **kwargs)


def pretend(rank: int, world_size: int, memory_bytes: int) -> None:
    """Emulate a GPU of `memory_bytes` and create a fake process group, for the rest of this process.

    Mutates torch.cuda, torch.distributed and the environment.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "mem_get_info": (memory_bytes, memory_bytes),
        "get_device_capability": (9, 0),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "memory_snapshot": [],
    }
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "_lazy_init",
    ):
        answers[name] = None
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **keywords: answer)
    torch.cuda.get_rng_state = lambda *arguments, **keywords: torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *arguments: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    torch._C._set_only_lift_cpu_tensors(True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    new_group = dist.new_group

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **keywords: Any) -> Any:
        keywords.pop("use_local_synchronization", None)
        return new_group(ranks, timeout, "fake", **keywords)

    def gather_alike(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    # Gathered objects are copies of this rank's object, because there are no other ranks. The last stage's
    # objects do not exist on other stages.
    distributed: Any = dist
    distributed.new_group, distributed.all_gather_object = fake_group, gather_alike
    groups._gather_objects = lambda value, group, size: [value] * size
    from_last_stage = groups.Groups.from_last_stage

    def tensor_from_last_stage(self: Any, value: Any) -> Any:
        return from_last_stage(self, value) if isinstance(value, torch.Tensor) else value

    groups.Groups.from_last_stage = tensor_from_last_stage  # type: ignore[method-assign]


def accommodate_megatron() -> None:
    """Replace the TransformerEngine kernels and the CUDA random state that Megatron-Core uses on a GPU.

    Call this after `pretend`.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    megatron_random._get_cuda_rng_state = lambda *arguments, **keywords: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *arguments, **keywords: None
    clip_grads.multi_tensor_applier = lambda kernel, flag, lists, *rest: kernel(0, flag, lists, *rest)
    clip_grads.l2_norm_impl = _norm
    clip_grads.multi_tensor_scale_impl = _scale
    buffers._coalescing_manager = _no_coalescing
    dist.distributed_c10d._coalescing_manager = _no_coalescing  # type: ignore[assignment]
    communicate = P2PCommunicator._communicate_shapes

    def communicate_shapes(self: Any, *arguments: Any) -> tuple[Any, Any]:
        from_previous, from_next = communicate(self, *arguments)
        return from_previous and _next_shape("forward"), from_next and _next_shape("backward")

    P2PCommunicator._communicate_shapes = communicate_shapes


_hidden_shapes: list[tuple[int, int, int]] = []
_num_received: collections.Counter[str] = collections.Counter()


def expect_hidden_states(rows: Sequence[int], hidden_size: int) -> None:
    """Set the hidden states [rows, 1, hidden_size] that a pipeline stage receives per micro-batch of a
    pass."""
    _hidden_shapes[:] = [(count, 1, hidden_size) for count in rows]
    _num_received.clear()


def _next_shape(direction: str) -> tuple[int, int, int]:
    """Return the shape of the next hidden states or gradients from a neighbour stage: they arrive in
    order."""
    index = _num_received[direction] % len(_hidden_shapes)
    _num_received[direction] += 1
    return _hidden_shapes[index]


@contextlib.contextmanager
def fake_tensors() -> Iterator[Recorder]:
    """Make every tensor in the block a fake tensor; yield the `Recorder`."""
    recorder = Recorder()
    resize = torch.UntypedStorage.resize_

    def recorded(storage: torch.UntypedStorage, size: int) -> Any:
        recorder.resized(storage, size)
        return resize(storage, size)

    module: Any = torch.nn.Module
    storage: Any = torch.UntypedStorage
    to, address = module.to, storage.data_ptr
    module.to, storage.resize_ = _move_module, recorded
    storage.data_ptr = lambda storage: (
        storage._cdata
    )  # fake storages have no address: use the address of the object
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder, _OnDevice():
            yield recorder
    finally:
        module.to, storage.resize_, storage.data_ptr = to, resize, address


def _everything(index: torch.Tensor | None) -> torch.Tensor | None:
    """Replace a boolean mask by all indices, because a fake mask has no values."""
    if index is None or index.dtype is not torch.bool:
        return index
    return torch.arange(index.numel(), device=index.device)


def _move_module(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
    """Move a module to the GPU by new parameters: torch cannot swap fake parameter data between devices."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != "cuda":
                moved = torch.nn.Parameter(parameter.detach().to(DEVICE), parameter.requires_grad)
                # Copy Megatron's attributes; a fake tensor's own attributes, such as its device, already
                # exist.
                moved.__dict__.update(
                    {key: value for key, value in vars(parameter).items() if key not in vars(moved)}
                )
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(DEVICE)
    return module


def _norm(chunk: int, flag: Any, lists: list[list[torch.Tensor]], *rest: Any) -> tuple[torch.Tensor, None]:
    return torch.stack([tensor.norm().float() for tensor in lists[0]]).norm()[None], None


def _scale(chunk: int, flag: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
    for source, target in zip(lists[0], lists[1], strict=True):
        target.copy_(source * factor)


@contextlib.contextmanager
def _no_coalescing(*arguments: Any, **keywords: Any) -> Iterator[_Stream]:
    yield _Stream()


def _group_name(arguments: Sequence[Any]) -> str:
    """Return Megatron's description and the size of the process group among a collective's arguments."""
    for argument in arguments:
        with contextlib.suppress(Exception):
            group = dist.ProcessGroup.unbox(argument)
            return f"{group.group_desc.lower().removesuffix('_group')} ({group.size()})"
    return "an unknown group"


def _caller() -> str:
    """Return the name of the innermost running function of this package or of Megatron."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(OWN_PACKAGES) and not module.startswith("rlsc_mcore.rehearsal"):
            return f"{module}.{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
