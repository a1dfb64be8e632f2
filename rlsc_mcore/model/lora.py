"""LoRA on merged weights: the parameter that trainer and engine share holds W = W0 + s B A, s = alpha / r.

Forward is one product with W, as without adapters, so the engine and the hot swap stay as they are. Backward
computes dB = s dy^T (x A^T) and dA = s (dy B)^T x, never a gradient of W. After each update W is written
again from the unchanged W0, so rounding does not accumulate.

Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1. A is initialised as in the `peft` package (Kaiming
uniform, that is U(-1 / sqrt(I), 1 / sqrt(I))), B with zeros.

Under tensor parallelism A of a column-parallel layer and B of a row-parallel layer are whole on every rank.
Their gradients are partial sums, which Megatron's `finalize_model_grads` adds over the TP group because of
the mark `sequence_parallel`.
"""

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    _gather_along_first_dim,
    _reduce_scatter_along_first_dim,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from safetensors.torch import save_file
from torch import nn

from rlsc_mcore.config import LoraConfig
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, qkv_row_index
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.made_here import check_replaceable, replacing

ADAPTERS = "adapters"  # name of the adapters in the model and in its checkpoints
Rows = torch.Tensor | slice
MERGED_ROWS = 4096  # rows of W that are merged at once, in float32


class LoraPair(nn.Module):
    """The two factors of one Hugging Face projection on this rank, A [r, I] and B [O, r], and its W0 [O, I].

    `rows`: the rows of the Megatron weight that belong to the projection, in Hugging Face order: a slice, or
    int64 [O] on the device of the weight.
    """

    def __init__(
        self, projection: str, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor, rows: Rows
    ) -> None:
        super().__init__()
        self.projection = projection  # for example "model.layers.0.self_attn.q_proj"
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.base, self.rows = base, rows

    def part_of_rows(self, start: int, stop: int) -> Rows:
        """Return rows `start` to `stop` of the projection in the Megatron weight."""
        if isinstance(self.rows, slice):
            return slice(self.rows.start + start, self.rows.start + stop)
        return self.rows[start:stop]


@dataclass
class LoraLinear:
    """A linear layer of Megatron with frozen weight and the pairs of its projections."""

    weight: nn.Parameter  # W, which the engine aliases
    pairs: list[LoraPair]
    scale: float
    is_column_parallel: bool
    tp_group: Any  # None without tensor parallelism

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Yield (rows, W0 + s B A of these rows in the type of W), at most MERGED_ROWS rows at a
        time.

        Each row is rounded once. On one machine the values are equal bit for bit at every call.
        """
        for pair in self.pairs:
            A = pair.A.detach().float()
            for start in range(0, len(pair.B), MERGED_ROWS):
                stop = min(start + MERGED_ROWS, len(pair.B))
                base = pair.base[start:stop].to(self.weight.device, non_blocking=True).float()
                B = pair.B[start:stop].detach().float()
                values = torch.addmm(base, B, A, alpha=self.scale).to(self.weight.dtype)
                yield pair.part_of_rows(start, stop), values

    def gradients(self, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        """Compute dA and dB of every pair, in order.

        x [T', I'] and dy [T'', O'] are the layer's input and the gradient of its output on this rank. Two
        collectives of r columns per pair over the TP group.
        """
        A = torch.cat([pair.A for pair in self.pairs])
        ranks = [len(pair.A) for pair in self.pairs]
        outputs = [dy[:, pair.rows] if len(self.pairs) > 1 else dy for pair in self.pairs]
        projected = x @ A.t()  # x A^T of all pairs, [T', P r]
        returned = torch.cat(
            [output @ pair.B for output, pair in zip(outputs, self.pairs, strict=True)], dim=1
        )
        if self.tp_group is not None and self.is_column_parallel:
            # x is this rank's share of the tokens, dy has all tokens and this rank's columns.
            projected = _gather_along_first_dim(projected, group=self.tp_group)
            returned = _reduce_scatter_along_first_dim(returned, group=self.tp_group)
        elif self.tp_group is not None:  # x has all tokens and this rank's columns, dy a share of the tokens
            projected = _reduce_scatter_along_first_dim(projected, group=self.tp_group)
            returned = _gather_along_first_dim(returned, group=self.tp_group)
        gradients = []
        for output, left, right in zip(
            outputs, projected.split(ranks, dim=1), returned.split(ranks, dim=1), strict=True
        ):
            gradients += [self.scale * (right.t() @ x), self.scale * (output.t() @ left)]
        return gradients


class _AdapterGradients(torch.autograd.Function):
    """Return a layer's output unchanged; backward computes the gradients of its adapters."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, linear: LoraLinear, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gradients = ctx.linear.gradients(x.flatten(0, -2), dy.flatten(0, -2))
        return dy, None, None, *gradients


class LoraAdapters(nn.Module):
    """All adapters of a policy on this rank; the rest of the policy is frozen."""

    def __init__(self, linears: Sequence[LoraLinear]) -> None:
        super().__init__()
        self.linears = list(linears)
        self.pairs = nn.ModuleDict(
            {
                pair.projection.replace(".", "/"): pair  # a name in torch has no dots
                for linear in linears
                for pair in linear.pairs
            }
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Write W = W0 + s B A into the shared weights, in place."""
        for linear in self.linears:
            for rows, values in linear.merged():
                linear.weight[rows] = values

    @contextlib.contextmanager
    def starting_weights(self) -> Iterator[None]:
        """Let the policy be the model before training, W0, inside the block; no second copy is made."""
        with torch.no_grad():
            for linear in self.linears:
                for pair in linear.pairs:
                    linear.weight[pair.rows] = pair.base.to(linear.weight.device)
        try:
            yield
        finally:
            self.merge()

    @torch.no_grad()
    def stale(self, turn: int) -> str | None:
        """Return a projection whose shared weight is not W0 + s B A, None if there is none.

        Checks one layer of the model, the next at each `turn`.
        """
        linear = self.linears[turn % len(self.linears)]
        current = all(bool((linear.weight[rows] == values).all()) for rows, values in linear.merged())
        return None if current else linear.pairs[0].projection

    def describe(self, config: LoraConfig, tp_size: int) -> str:
        """Return one line on the adapters of this rank's pipeline stage."""
        numel = sum(
            factor.numel() * (tp_size if getattr(factor, "tensor_model_parallel", False) else 1)
            for factor in self.parameters()
        )
        return (
            f"LoRA: rank {config.rank}, alpha {config.alpha:g}, {numel / 1e6:.2f} M parameters in "
            f"{len(self.pairs)} projections; W0 is on the {self.base_tensors()[0].device.type}"
        )

    def base_tensors(self) -> list[torch.Tensor]:
        """Return the tensors W0 of this rank."""
        return [pair.base for linear in self.linears for pair in linear.pairs]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the factors for a checkpoint that any parallel layout can load."""
        state: dict[str, Any] = {}
        for linear in self.linears:
            for pair in linear.pairs:
                split = "B" if linear.is_column_parallel else "A"
                for name, factor in (("A", pair.A), ("B", pair.B)):
                    key = f"{prefix}pairs.{pair.projection.replace('.', '/')}.{name}"
                    axis = 0 if name == "B" else 1
                    state[key] = (
                        make_tp_sharded_tensor_for_checkpoint(factor, key, tp_axis=axis)
                        if name == split
                        else make_sharded_tensor_for_checkpoint(factor, key)
                    )
        return state


def write_adapter(
    adapters: LoraAdapters, config: LoraConfig, model: str, output: Path, groups: Groups
) -> None:
    """Write the adapters as a folder that `peft` loads; `model` names the model before training in it.

    Collective over the ranks of a model group. Raises `ConfigError` if `output` is a folder that this program
    did not create.
    """
    mine = {
        pair.projection: (pair.A.detach().cpu(), pair.B.detach().cpu(), linear.is_column_parallel)
        for linear in adapters.linears
        for pair in linear.pairs
    }
    parts = groups.gather_objects_over_model(mine)  # of a stage in tensor-parallel order, stage by stage
    if not groups.is_main:
        return
    tensors: dict[str, torch.Tensor] = {}
    for first in range(0, len(parts), groups.tp_size):
        stage = parts[first : first + groups.tp_size]
        for projection, (a, b, is_column_parallel) in stage[0].items():
            if groups.tp_size > 1 and is_column_parallel:
                b = torch.cat([part[projection][1] for part in stage])
            elif groups.tp_size > 1:
                a = torch.cat([part[projection][0] for part in stage], dim=1)
            tensors[f"base_model.model.{projection}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{projection}.lora_B.weight"] = b.contiguous()
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    check_replaceable(output, field="export to")
    with replacing(output, "rlsc export --adapter") as partial:
        file = partial / "adapter_config.json"
        file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        # safetensors creates files that only their owner can read.
        shutil.copymode(file, partial / "adapter_model.safetensors")


def attach_adapters(
    model: nn.Module,
    weights: Sequence[BoundWeight],
    architecture: Architecture,
    config: LoraConfig,
    groups: Groups,
    seed: int,
    *,
    on_host: bool,
) -> LoraAdapters:
    """Freeze `model` and give the target projections adapters; returns them.

    The weights must be loaded: W0 is copied from them, to page-locked host memory if `on_host`. The initial A
    depends on `seed` and the projection only, not on the parallel layout. Mutates `model`: it gets hooks and
    the child `adapters`.
    """
    model.requires_grad_(False)
    linears = []
    for weight in weights:
        projections = [name.removesuffix(".weight") for name in weight.hf]
        chosen = [name.rpartition(".")[2] in config.targets for name in projections]
        if not weight.name.endswith(".weight") or not any(chosen):
            continue
        linear = _make_linear(weight, projections, chosen, architecture, config, groups, seed, on_host)
        model.get_submodule(weight.name.removesuffix(".weight")).register_forward_hook(_hook(linear))
        linears.append(linear)
    adapters = LoraAdapters(linears)
    model.add_module(ADAPTERS, adapters)
    return adapters


def _hook(linear: LoraLinear) -> Any:
    factors = [factor for pair in linear.pairs for factor in (pair.A, pair.B)]

    def hook(module: nn.Module, inputs: tuple[Any, ...], result: Any) -> Any:
        output, bias = result  # Megatron's linear layers return the bias that they did not add
        return _AdapterGradients.apply(output, inputs[0], linear, *factors), bias

    return hook


def _make_linear(
    weight: BoundWeight,
    projections: Sequence[str],
    chosen: Sequence[bool],
    architecture: Architecture,
    config: LoraConfig,
    groups: Groups,
    seed: int,
    on_host: bool,
) -> LoraLinear:
    parameter = weight.parameter
    is_column_parallel = weight.tp_dim == 0
    pairs = []
    for projection, rows, is_target in zip(
        projections, _rows_of(weight, architecture, groups.tp_size), chosen, strict=True
    ):
        if is_target:
            base = parameter.detach()[rows].clone()
            a = _initial_a(projection, config.rank, parameter.shape[1], is_column_parallel, groups, seed)
            pair = LoraPair(
                projection,
                a.to(parameter),
                parameter.new_zeros(len(base), config.rank),
                base.cpu().pin_memory() if on_host else base,
                rows,
            )
            _mark(pair, is_column_parallel, groups.tp_size)
            pairs.append(pair)
    return LoraLinear(
        parameter,
        pairs,
        config.alpha / config.rank,
        is_column_parallel,
        groups.tp_group if groups.tp_size > 1 else None,
    )


def _rows_of(weight: BoundWeight, architecture: Architecture, tp_size: int) -> list[Rows]:
    """Return the rows of this rank's weight that belong to each of its Hugging Face tensors."""
    if weight.layout == "qkv":
        heads, keys = architecture.num_heads // tp_size, architecture.num_kv_heads // tp_size
        index = qkv_row_index(heads, keys, architecture.head_dim).to(weight.parameter.device)
        return list(index.split([count * architecture.head_dim for count in (heads, keys, keys)]))
    share = weight.parameter.shape[0] // len(weight.hf)
    return [slice(number * share, (number + 1) * share) for number in range(len(weight.hf))]


def _initial_a(
    projection: str, rank: int, width: int, is_column_parallel: bool, groups: Groups, seed: int
) -> torch.Tensor:
    """Draw the whole A and return this rank's columns of it, float32 [r, width]."""
    whole = width if is_column_parallel else width * groups.tp_size
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(projection.encode()))
    bound = 1 / math.sqrt(whole)
    a = torch.empty(rank, whole).uniform_(-bound, bound, generator=generator)
    # Contiguous, because fused Adam kernels pair the elements of parameter and gradient by address.
    return a if is_column_parallel else a.narrow(1, groups.tp_rank * width, width).contiguous()


def _mark(pair: LoraPair, is_column_parallel: bool, tp_size: int) -> None:
    """Tell Megatron which factor is sharded over TP and which has a gradient that is a partial sum."""
    sharded, whole = (pair.B, pair.A) if is_column_parallel else (pair.A, pair.B)
    set_tensor_model_parallel_attributes(sharded, True, 0 if is_column_parallel else 1, 1)
    set_tensor_model_parallel_attributes(whole, False, -1, 1)
    whole.sequence_parallel = tp_size > 1  # type: ignore[attr-defined]
