"""Offload the optimizer state (moments and fp32 master weights) to the host while the engine samples.

The state returns bit for bit. `offload_to_cpu` of Megatron-Core 0.16.1 also moves the parameters of a float32
model, which are views of the buffer that the engine aliases. They return as separate tensors, so later
updates do not reach the model; this module leaves them in place.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch


def state_tensors(optimizer: Any, kept: Collection[int]) -> list[torch.Tensor]:
    """List the tensors of Megatron's (chained) optimizer in a fixed order: master weights, then moments.

    `kept` are the addresses of the parameter buffers' storages; tensors in these storages are left out.
    """
    found: dict[int, torch.Tensor] = {}
    for tensor in _all_tensors(optimizer):
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in kept:
            found.setdefault(id(tensor), tensor)
    return list(found.values())


class StateOffload:
    """Move the optimizer state between its device and the host.

    The tensor objects stay the same: the optimizer keeps its references and sees the new storage. On the host
    the state can be read (a checkpoint is written from there); an update needs it on the device.
    """

    def __init__(self, optimizer: Any, kept: Collection[int], *, pin: bool) -> None:
        """Prepare the offload; `pin` page-locks the copy on the host.

        The copy is allocated once. With `pin`, transfers to and from a GPU are several times faster.
        """
        self._optimizer, self._kept, self._pin = optimizer, kept, pin
        self._host: list[torch.Tensor] = []
        self._moved: list[tuple[torch.Tensor, torch.device]] = []

    @property
    def is_out(self) -> bool:
        """Return whether the state is on the host."""
        return bool(self._moved)

    @torch.no_grad()
    def out(self) -> None:
        """Copy the state to the host and free its device memory."""
        if self.is_out:
            return
        tensors = state_tensors(self._optimizer, self._kept)
        if [(h.shape, h.dtype) for h in self._host] != [(t.shape, t.dtype) for t in tensors]:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pin) for t in tensors]
        for tensor, host in zip(tensors, self._host, strict=True):
            host.copy_(tensor, non_blocking=True)
        _wait(tensors)
        self._moved = [(tensor, tensor.device) for tensor in tensors]
        for tensor, host in zip(tensors, self._host, strict=True):
            tensor.data = host

    @torch.no_grad()
    def back(self) -> None:
        """Copy the state back to its device, into newly allocated memory."""
        moved, self._moved = self._moved, []
        for tensor, device in moved:
            home = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            home.copy_(tensor, non_blocking=True)
            tensor.data = home
        _wait([tensor for tensor, _ in moved])


def _all_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in chained.optimizer.param_groups:
            yield from group["params"]
        for state in chained.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _wait(tensors: list[torch.Tensor]) -> None:
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
