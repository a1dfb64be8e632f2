"""Choose device and collectives, and patch Megatron-Core so that it runs without a GPU.

Megatron-Core 0.16.1 names CUDA in four ways; each has one patch, applied only when torch sees no GPU:

1. ``device=torch.cuda.current_device()``: `current_device` returns ``torch.device("cpu")``;
2. ``device="cuda"`` literals and ``tensor.cuda()``: a torch function mode maps them to the CPU
   (`Backend.megatron`);
3. ``tensor.type() == "torch.cuda.FloatTensor"``: the same mode returns the CUDA type name;
4. the CUDA random state in recomputation: it is empty, and Megatron's own no-op tracker is used.

A fifth patch applies where neither TransformerEngine nor Apex is installed (a CPU, or a GPU without them):

5. TransformerEngine's FusedAdam keeps ``step`` in the parameter group, and Megatron's distributed optimizer
   can load only such a checkpoint; `TorchFusedAdam` has the same layout in plain torch.

Only these functions are patched: replacing, for example, `torch.cuda.Stream` breaks other libraries' imports.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from rlsc_mcore.config import ConfigError
from rlsc_mcore.observability.memory_pools import Pools, device_pools, host_pools
from rlsc_mcore.parallel.cpu_products import MATMULS, product_or_none, products_in_use
from rlsc_mcore.parallel.packages import hide_broken_torchvision
from rlsc_mcore.parallel.torch_adam import TorchFusedAdam

_CUDA_SPELLINGS = ("cuda", torch.device("cuda"))


class _MegatronOnCpu(TorchFunctionMode):
    """Inside a scope, map ``"cuda"`` to the CPU and multiply float32 matrices with the faster library."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func in MATMULS and (product := product_or_none(*args[:2])) is not None:
            out = (kwargs or {}).get("out")
            return product if out is None else out.copy_(product)
        if (
            func is torch.Tensor.addmm_
            and not kwargs
            and (product := product_or_none(*args[1:3])) is not None
        ):
            return args[0].add_(product)
        if kwargs and kwargs.get("device") in _CUDA_SPELLINGS:
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            result = result.replace("torch.", "torch.cuda.", 1)
        return result


def device_type() -> Literal["cpu", "cuda"]:
    """Return "cuda" if torch finds a GPU, else "cpu". Only this module asks torch whether there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def num_gpus() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count()


class Backend:
    """Hold device, collective library and scopes of this process.

    Created once by `get_backend`, before Megatron-Core is used.
    """

    def __init__(self) -> None:
        self.is_cuda = device_type() == "cuda"
        self.collectives = "nccl" if self.is_cuda else "gloo"
        hide_broken_torchvision()
        if self.is_cuda:
            torch.cuda.set_device(local_device_index(int(os.environ.get("LOCAL_RANK", "0")), num_gpus()))
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            self.device = torch.device("cpu")
            self._accommodate_megatron()
        self._use_torch_adam_where_alone()

    def megatron(self) -> contextlib.AbstractContextManager[Any]:
        """Return the scope in which "cuda" literals and CUDA type names mean this process's device.

        All Megatron code runs inside it.
        """
        return contextlib.nullcontext() if self.is_cuda else _MegatronOnCpu()

    def seed(self, seed: int) -> None:
        """Seed torch and Megatron's tensor-parallel random state trackers."""
        from megatron.core import tensor_parallel

        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(
            seed, inference_rng_tracker=not self.is_cuda, force_reset_rng=True
        )

    def synchronize(self) -> None:
        """Wait for the device, so that a phase's time includes its device work."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def release_cached_memory(self) -> None:
        """Release freed memory that the allocator caches: on a GPU to the device, on a CPU to the system.

        glibc keeps freed memory below a block in use. Two caches of prepared kernels still grow, by one entry
        per shape: torch's (LRU_CACHE_CAPACITY) and oneDNN's (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
        `quiet_libraries` limits both.
        """
        if self.is_cuda:
            torch.cuda.empty_cache()
        else:
            with contextlib.suppress(AttributeError):  # only glibc has malloc_trim
                ctypes.CDLL(None).malloc_trim(0)

    def adam_source(self) -> str:
        """Name the fused Adam that Megatron-Core uses: TransformerEngine's, else Apex's, else torch's."""
        import megatron.core.optimizer as optimizer

        package = optimizer.Adam.__module__.partition(".")[0]
        if package == "transformer_engine":
            return "TransformerEngine's FusedAdam"
        if package == "apex":
            return "Apex's FusedAdam (TransformerEngine does not import)"
        return "torch's fused Adam (neither TransformerEngine nor Apex imports)"

    def memory_bytes(self) -> dict[str, int]:
        """Measure the resident set of the process and, on a GPU, device memory.

        The device values are allocated, reserved, peak and free bytes.
        """
        with open("/proc/self/statm", encoding="ascii") as statm:
            memory = {"host_resident": int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
        if self.is_cuda:
            memory["device_allocated"] = torch.cuda.memory_allocated()
            memory["device_reserved"] = torch.cuda.memory_reserved()
            memory["device_peak"] = torch.cuda.max_memory_allocated()
            memory["device_free"] = torch.cuda.mem_get_info()[0]
        return memory

    def account_memory(
        self, owned: Mapping[str, Mapping[int, int]], graph_pool: tuple[int, int] | None
    ) -> Pools:
        """Return the current memory by owner; see `observability.memory_pools`.

        On a GPU this waits for the device and takes a few ms on the host.
        """
        if not self.is_cuda:
            with open("/proc/meminfo", encoding="ascii") as meminfo:
                kib = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:"))
            return host_pools(owned, resident=self.memory_bytes()["host_resident"], available=kib << 10)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        segments = [
            segment for segment in torch.cuda.memory_snapshot() if segment["device"] == self.device.index
        ]
        return device_pools(owned, segments, graph_pool, total=total, free=free)

    def _accommodate_megatron(self) -> None:
        torch.cuda.current_device = lambda: self.device  # type: ignore[assignment,return-value]
        torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
        import megatron.core.tensor_parallel.random as megatron_random

        from rlsc_mcore.parallel.megatron_versions import use_cpu_streams

        use_cpu_streams()

        megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
        megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
        self._multiply_with_onednn_in_backward()

    @staticmethod
    def _multiply_with_onednn_in_backward() -> None:
        """Enter the scope in Megatron's linear backward if its products use oneDNN.

        Autograd runs a backward outside function modes.
        """
        from megatron.core.tensor_parallel.layers import (
            LinearWithGradAccumulationAndAsyncCommunication as Linear,
        )

        backward = Linear.backward

        def in_scope(ctx: Any, grad_output: torch.Tensor) -> Any:
            if products_in_use().trainer == "blas":
                return backward(ctx, grad_output)
            with _MegatronOnCpu():
                return backward(ctx, grad_output)

        Linear.backward = staticmethod(in_scope)

    @staticmethod
    def _use_torch_adam_where_alone() -> None:
        import megatron.core.optimizer as optimizer
        import megatron.core.optimizer.distrib_optimizer as distributed

        if not distributed.HAVE_APEX_OR_TE:
            optimizer.Adam = distributed.Adam = TorchFusedAdam
            optimizer.USING_PYTORCH_OPTIMIZER = False
            distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True


def local_device_index(local_rank: int, visible: int) -> int:
    """Return the index of the GPU that a process uses: the only visible one, else that of its local rank.

    A launcher that binds one GPU to each task makes only one visible. Raises `ConfigError` if there are fewer
    GPUs than processes.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"LOCAL_RANK: process {local_rank} of this node sees {visible} GPUs; start one process per GPU, "
            "or bind one GPU to each task"
        )
    return local_rank


@functools.cache
def get_backend() -> Backend:
    """Return this process's backend; the first call patches Megatron-Core (see the module docstring)."""
    return Backend()
