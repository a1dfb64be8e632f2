"""Time a training step by part of the model, forward and backward, in `Trainer.step`."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.training.step import Trainer


class _Mark(torch.autograd.Function):
    """Return the tensor unchanged and call `act` in its backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, act: Callable[[], None]) -> torch.Tensor:
        ctx.act = act
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.act()
        return gradient, None


class PartTimer:
    """Measure intervals per part: with CUDA events on a GPU, with this process's CPU time on a CPU, so that
    other processes have no effect."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._open: dict[str, list[Any]] = defaultdict(list)
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def begin(self, part: str) -> None:
        """Open an interval of a part."""
        self._open[part].append(self._now())

    def end(self, part: str) -> None:
        """Close the interval of a part that was opened last."""
        self._spans[part].append((self._open[part].pop(), self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part. Waits for the device."""
        self._backend.synchronize()
        assert not any(self._open.values()), (
            f"left open: {[part for part, spans in self._open.items() if spans]}"
        )
        return {part: sum(self._between(*span) for span in spans) for part, spans in self._spans.items()}

    def _now(self) -> Any:
        if not self._backend.is_cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3 if self._backend.is_cuda else last - first

    def around(self, part: str, call: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
        """Time `call(tensor)` and its backward pass from its (first) result back to `tensor`. Return the
        result."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            tensor = _Mark.apply(tensor, lambda: self.end(part))
        self.begin(part)
        result = call(tensor)
        self.end(part)
        first, *rest = result if isinstance(result, tuple) else (result,)
        if torch.is_grad_enabled() and first.requires_grad:
            first = _Mark.apply(first, lambda: self.begin(part))
        return (first, *rest) if isinstance(result, tuple) else first


@contextmanager
def timed_parts(trainer: Trainer) -> Iterator[PartTimer]:
    """Time attention, MLP (each with its norm), head and optimizer of every step inside the block.

    The interval of a part includes its collectives and its recomputation.
    """
    timer, model = PartTimer(trainer.backend), trainer.policy.model
    wrapped: list[tuple[Any, str]] = []

    def wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        setattr(owner, name, replacement)
        wrapped.append((owner, name))

    for layer in model.decoder.layers:
        for name, part in (
            ("input_layernorm", "attention"),
            ("self_attention", "attention"),
            ("pre_mlp_layernorm", "mlp"),
            ("mlp", "mlp"),
        ):
            module = getattr(layer, name)
            if not isinstance(module, IdentityOp):  # TransformerEngine fuses the norm with the next product
                wrap(module, "forward", _timed(timer, part, module.forward))
    plain_head, plain_update = model._postprocess, trainer._update

    def head(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return timer.around("head", lambda hidden: plain_head(hidden, *args, **kwargs), hidden_states)

    def update(loss: float) -> Any:
        timer.begin("optimizer")
        result = plain_update(loss)
        timer.end("optimizer")
        return result

    wrap(model, "_postprocess", head)
    wrap(trainer, "_update", update)
    try:
        yield timer
    finally:
        for owner, name in wrapped:
            delattr(owner, name)


def _timed(timer: PartTimer, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return timer.around(part, lambda each: forward(each, *args, **kwargs), tensor)

    return call


def seconds_in_collectives(backend: Backend, act: Callable[[], Any]) -> float:
    """Run `act` under torch's profiler and return the seconds of its collectives, including those that
    overlap with computation.

    On a GPU these are NCCL's kernels, on a CPU gloo's operations on this rank.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if backend.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        act()
        backend.synchronize()
    gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = profile.events() or []
    if backend.is_cuda:
        collectives = [
            event for event in events if event.device_type == gpu and event.name.startswith("ncclDevKernel")
        ]
    else:
        collectives = [event for event in events if event.name.startswith("gloo:")]
    return sum(event.time_range.elapsed_us() for event in collectives) / 1e6
