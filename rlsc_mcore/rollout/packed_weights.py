"""Packed copies of the engine's weights for a CPU: made from the shared weights after each update.

oneDNN multiplies few rows faster with a weight in its own layout. vLLM packs once and empties the parameter,
so a hot swap would have no effect. Here the parameter stays, and the copy is made again before the first
answer after each update. A copy of other weights than the parameter's raises an error.
"""

from typing import Any

import torch

from rlsc_mcore.config import RunError
from rlsc_mcore.parallel.cpu_products import cpu_linear

CHECKED_ROWS = 64
"""Rows of each weight whose bits are compared before answers are sampled."""

_PRIMITIVES_PER_WEIGHT = 32  # kernels that vLLM's product keeps, one per number of rows


class PackedLinear:
    """Multiply with a packed copy of one layer's weight, or with the weight itself while there is no copy.

    `layer` is vLLM's module. Its float32 `weight` [N, K] is read at each `pack`.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._packed: Any = None
        self._checksum = 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x [..., K] @ weight.T [K, N] + bias [N]; no autograd."""
        if self._packed is None or not x.numel():
            return cpu_linear(x, weight, bias)
        return multiply_packed(self._packed, x, bias)

    def pack(self) -> None:
        """Make the copy, or compare the copy that exists with the weight; raises `RunError` if they
        differ."""
        checksum = _checksum(self.layer.weight)
        if self._packed is None:
            self._packed, self._checksum = pack(self.layer.weight), checksum
        elif checksum != self._checksum:
            raise RunError(
                f"packed engine weights: {getattr(self.layer, 'prefix', type(self.layer).__name__)} changed "
                "after it was packed; swap the weights before answers are sampled"
            )

    def release(self) -> None:
        """Free the copy."""
        self._packed = None

    def nbytes(self) -> int:
        """Return the bytes of the copy; 0 without one."""
        return 0 if self._packed is None else int(self.layer.weight.nbytes)


class PackedWeights:
    """Hold the packed copies of all of an engine's linear layers."""

    def __init__(self) -> None:
        self._layers: list[PackedLinear] = []

    def adopt(self, layer: Any, remove_weight: bool) -> None:
        """Set the product of `layer`, a linear layer of vLLM, which calls this while the engine is built."""
        if layer.weight.dim() != 2 or layer.weight.dtype is not torch.float32:
            layer.cpu_linear = cpu_linear
            return
        packed = PackedLinear(layer)
        layer.cpu_linear = packed
        self._layers.append(packed)

    def pack(self) -> None:
        """Make the copies that do not exist, and check the others; raises `RunError` for a stale one."""
        for layer in self._layers:
            layer.pack()

    def release(self) -> None:
        """Free all copies; call it before the weights change."""
        for layer in self._layers:
            layer.release()

    def nbytes(self) -> int:
        """Return the bytes of all copies."""
        return sum(layer.nbytes() for layer in self._layers)


def pack(weight: torch.Tensor) -> Any:
    """Return a copy of a float32 weight [N, K] in oneDNN's layout."""
    from vllm import _custom_ops

    return _custom_ops.create_onednn_mm(weight.detach().t(), _PRIMITIVES_PER_WEIGHT)


def multiply_packed(packed: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [..., K] @ W.T [K, N] + bias [N] for the copy `packed` of W; no autograd."""
    from vllm import _custom_ops

    return _custom_ops.onednn_mm(packed, x, bias)


def _checksum(weight: torch.Tensor) -> int:
    """Return a sum over the bits of at most `CHECKED_ROWS` rows, spread over the weight."""
    rows = weight.detach()[:: max(1, len(weight) // CHECKED_ROWS)]
    return int(rows.view(torch.int32).sum(dtype=torch.int64))
