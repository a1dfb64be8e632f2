"""Layers on torch's own operations, for Megatron-Core's layer spec where TransformerEngine is not used."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that supports sequence parallelism: it marks its weight so that Megatron all-reduces the
    gradient over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SwiGLU:
    """silu(gate) * up, [.., 2 * ffn] -> [.., ffn], in `MLPSubmodules.activation_func`.

    Not a module, so that checkpoints have no entry for it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        assert config.gated_linear_unit and config.activation_func is F.silu

    def __call__(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]
        return output


class _SwiGLU(torch.autograd.Function):
    """Write both halves of the gradient in place. Autograd's own chunk concatenates them."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


class _Rotate(torch.autograd.Function):
    """Rotate [T, heads, dim] by angles with cosine and sine [T, 1, dim]; the inverse rotation is the
    gradient."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = heads.size(-1) // 2
    result = heads * cos
    result[..., :half].sub_(heads[..., half:] * sin[..., :half], alpha=sign)
    result[..., half:].add_(heads[..., :half] * sin[..., half:], alpha=sign)
    return result


@dataclass(frozen=True)
class RotaryFactors:
    """Cosine and sine of every packed token's angles, [T, 1, dim] in the layers' data type; computed once per
    batch."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, angles: torch.Tensor, sequence_lengths: Sequence[int], dtype: torch.dtype) -> "RotaryFactors":
        """Gather the factors of concatenated whole sequences from `angles`, float32 [longest, 1, 1, dim];
        never waits for a GPU.

        Megatron-Core's own function for packed sequences copies the lengths from the device in every layer,
        and stores separate factors for the backward pass of each layer.
        """
        positions = torch.cat([torch.arange(length) for length in sequence_lengths])
        chosen = angles[:, 0].index_select(0, positions.to(angles.device, non_blocking=True))
        return cls(chosen.cos().to(dtype), chosen.sin().to(dtype))

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate [T, heads, dim] by each token's angles. The two halves of a head are the two elements of
        each rotated pair."""
        rotated: torch.Tensor = _Rotate.apply(heads, self.cos, self.sin)  # type: ignore[no-untyped-call]
        return rotated


class SDPACoreAttention(MegatronModule):
    """Causal attention on torch's `scaled_dot_product_attention`, for packed (thd) and padded (sbhd)
    input."""

    def __init__(
        self, config: TransformerConfig, *args: Any, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence: [T, heads, dim] packed, or [s, b, heads, dim]; returns [.., heads *
        dim].

        Rotates queries and keys first if the batch has rotary factors (see `PolicyModel`).
        """
        if packed_seq_params is None:
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            mask = None if attention_mask is None else ~attention_mask  # Megatron's True means masked out
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
            return output.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
        rotary = getattr(packed_seq_params, "rotary", None)
        if rotary is not None:
            query, key = rotary.rotate(query), rotary.rotate(key)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return self._varlen(query, key, value, packed_seq_params).reshape(query.size(0), -1)
        return self._per_sequence(query, key, value, packed_seq_params).reshape(query.size(0), -1)

    def _varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        repeat = query.size(1) // key.size(1)
        options: dict[str, Any] = {}
        if repeat > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options.update(enable_gqa=True)
        elif repeat > 1:  # torch 2.11
            key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        cu_seqlens, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        output = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
            **options,
        )
        assert isinstance(output, torch.Tensor)  # returns a pair only if the log-sum-exp is requested
        return output

    def _per_sequence(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        lengths = getattr(packed, "sequence_lengths", None) or packed.cu_seqlens_q.diff().tolist()
        # Neighbours of equal length are one call; packing sorts by length.
        shapes = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths)]
        sizes = [count * length for count, length in shapes]
        # split and cat instead of slices: with slices autograd would write every gradient into a full-size
        # zero tensor per sequence.
        parts = zip(shapes, *(tensor.split(sizes) for tensor in (query, key, value)), strict=True)
        outputs = []
        for shape, *qkv in parts:
            q, k, v = (tensor.unflatten(0, shape).transpose(1, 2) for tensor in qkv)
            output = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)
