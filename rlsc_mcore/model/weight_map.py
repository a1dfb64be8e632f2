"""Map weight names and layouts between Hugging Face, Megatron-Core and vLLM; used by import, export and hot
swap.

Layouts of a parameter on one tensor-parallel rank in Megatron:

- ``plain``: a slice of the Hugging Face tensor along `tp_dim` (or all of it);
- ``gate_up``: this rank's rows of gate, then of up (same in vLLM);
- ``qkv``: queries, key and value of each query group in turn (vLLM: all queries, all keys, all values of the
  rank).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import nn

from rlsc_mcore.model.shape import Architecture

Layout = Literal["plain", "gate_up", "qkv"]
# Reads rows or columns [start, stop) of a named tensor along a dimension; dimension None reads all of it.
ReadSlice = Callable[[str, int | None, int, int], torch.Tensor]
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class WeightRule:
    """One row of the table. Names in layer rows are relative to the prefix of their layer."""

    megatron: tuple[str, ...]  # alternative names: torch layers, TransformerEngine layers
    hf: tuple[str, ...]
    engine: str
    layout: Layout = "plain"
    tp_dim: int | None = None


EMBEDDING = WeightRule(
    ("embedding.word_embeddings.weight",),
    ("model.embed_tokens.weight",),
    "model.embed_tokens.weight",
    tp_dim=0,
)
HEAD = WeightRule(("output_layer.weight",), ("lm_head.weight",), "lm_head.weight", tp_dim=0)
TOP_RULES = (
    EMBEDDING,
    WeightRule(("decoder.final_layernorm.weight",), ("model.norm.weight",), "model.norm.weight"),
    HEAD,
)
LAYER_RULES = (
    WeightRule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("input_layernorm.weight",),
        "input_layernorm.weight",
    ),
    WeightRule(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "self_attn.qkv_proj.weight",
        "qkv",
        0,
    ),
    WeightRule(
        ("self_attention.linear_qkv.bias",),
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "self_attn.qkv_proj.bias",
        "qkv",
        0,
    ),
    WeightRule(
        ("self_attention.q_layernorm.weight",), ("self_attn.q_norm.weight",), "self_attn.q_norm.weight"
    ),
    WeightRule(
        ("self_attention.k_layernorm.weight",), ("self_attn.k_norm.weight",), "self_attn.k_norm.weight"
    ),
    WeightRule(
        ("self_attention.linear_proj.weight",),
        ("self_attn.o_proj.weight",),
        "self_attn.o_proj.weight",
        tp_dim=1,
    ),
    WeightRule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("post_attention_layernorm.weight",),
        "post_attention_layernorm.weight",
    ),
    WeightRule(
        ("mlp.linear_fc1.weight",),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.gate_up_proj.weight",
        "gate_up",
        0,
    ),
    WeightRule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), "mlp.down_proj.weight", tp_dim=1),
)


@dataclass(frozen=True)
class BoundWeight:
    """A parameter of this rank with its names in Hugging Face and vLLM, and its layout."""

    name: str  # Megatron's
    parameter: nn.Parameter
    hf: tuple[str, ...]
    engine: str
    layout: Layout
    tp_dim: int | None
    is_vocabulary: bool  # rows are the padded vocabulary
    stages: tuple[int, ...] = (
        0,
    )  # pipeline stages that hold it; tied embeddings are on the first and the last

    @property
    def is_local(self) -> bool:
        """False for a weight of another pipeline stage; its parameter is on the meta device."""
        return not self.parameter.is_meta


def bind_weights(
    model: nn.Module, architecture: Architecture, stage_layers: Sequence[int] | None = None
) -> list[BoundWeight]:
    """Match every parameter of `model` with its rule; fails if a parameter has no rule.

    `stage_layers`: the layers of this pipeline stage, numbered over the whole model from 0; Megatron numbers
    them from 0 in each stage. If the embeddings are tied, the head of the last stage is a copy of the
    embedding.
    """
    parameters = dict(model.named_parameters())
    bound = []
    for rule in TOP_RULES:
        for name in rule.megatron:
            if name in parameters:
                held = EMBEDDING if rule is HEAD and architecture.tied_embeddings else rule
                bound.append(_bind(held, name, parameters.pop(name), "", ""))
    for number, layer in enumerate(range(architecture.num_layers) if stage_layers is None else stage_layers):
        megatron_prefix, hf_prefix = f"decoder.layers.{number}.", f"model.layers.{layer}."
        for rule in LAYER_RULES:
            for name in rule.megatron:
                if megatron_prefix + name in parameters:
                    full_name = megatron_prefix + name
                    bound.append(_bind(rule, full_name, parameters.pop(full_name), hf_prefix, hf_prefix))
    assert not parameters, f"parameters without a rule in the weight map: {sorted(parameters)}"
    return bound


@dataclass(frozen=True)
class DescribedWeight:
    """Description of a weight for other ranks: names, layout, shape and dtype, without values."""

    name: str
    hf: tuple[str, ...]
    engine: str
    layout: str
    tp_dim: int | None
    is_vocabulary: bool
    shape: tuple[int, ...]
    dtype: str

    def on_meta(self) -> BoundWeight:
        """Return the weight with a parameter on the meta device."""
        values = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")
        parameter = nn.Parameter(values, requires_grad=False)
        layout = cast(Layout, self.layout)
        return BoundWeight(
            self.name, parameter, self.hf, self.engine, layout, self.tp_dim, self.is_vocabulary
        )


def describe_weights(weights: Sequence[BoundWeight]) -> list[DescribedWeight]:
    """Return the descriptions of the weights for other ranks."""
    return [
        DescribedWeight(
            weight.name, weight.hf, weight.engine, weight.layout, weight.tp_dim, weight.is_vocabulary,
            tuple(weight.parameter.shape), str(weight.parameter.dtype).removeprefix("torch."),
        )
        for weight in weights
    ]  # fmt: skip


def join_stages(
    local: Sequence[BoundWeight], stage: int, described: Sequence[Sequence[DescribedWeight]]
) -> list[BoundWeight]:
    """Merge the weights of all pipeline stages into one list, in the same order on every rank of a model
    group.

    `local` holds the weights of this rank's `stage` with their parameters; `described` holds the descriptions
    of every stage. Weights outside the layers come first, then the layers in order.
    """
    stages: dict[str, list[int]] = {}
    joined: dict[str, BoundWeight] = {}
    for number, weights in enumerate(described):
        for weight in local if number == stage else [each.on_meta() for each in weights]:
            stages.setdefault(weight.engine, []).append(number)
            if weight.engine not in joined or weight.is_local:
                joined[weight.engine] = weight
    ordered = sorted(joined.values(), key=lambda weight: _layer_of(weight.engine))
    return [replace(weight, stages=tuple(stages[weight.engine])) for weight in ordered]


def _layer_of(engine_name: str) -> int:
    """Return the number of the layer; -1 for a weight outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", engine_name)
    return int(match[1]) if match else -1


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every Hugging Face tensor of the model."""
    hidden, ffn, dim = architecture.hidden_size, architecture.ffn_hidden_size, architecture.head_dim
    vocabulary = (architecture.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (hidden,),
    }
    if not architecture.tied_embeddings:
        shapes["lm_head.weight"] = vocabulary
    queries, keys = architecture.num_heads * dim, architecture.num_kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if architecture.qkv_bias:
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
    if architecture.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (dim,)
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (ffn, hidden)
    layer["mlp.down_proj.weight"] = (hidden, ffn)
    for number in range(architecture.num_layers):
        shapes.update({f"model.layers.{number}.{name}": shape for name, shape in layer.items()})
    return shapes


def qkv_row_index(num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Return int64 row indices such that ``megatron_qkv[index]`` is vLLM's [q; k; v], for the heads of one
    rank."""
    per_group = num_heads // num_kv_heads
    rows = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).reshape(
        num_kv_heads, per_group + 2, head_dim
    )
    return torch.cat(
        [rows[:, :per_group].reshape(-1), rows[:, per_group].reshape(-1), rows[:, per_group + 1].reshape(-1)]
    )


def shard_pieces(
    weight: BoundWeight, architecture: Architecture, read: ReadSlice, tp_rank: int, tp_size: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Read this rank's shard of a weight from Hugging Face tensors; reads only the slices of this rank.

    Yields (rows of the parameter, their values), at most `PIECE_BYTES` of a vocabulary at a time. Padding
    rows of the vocabulary are zero.
    """
    shape = weight.parameter.shape
    everything = slice(0, shape[0])
    if weight.layout == "qkv":
        groups = architecture.num_kv_heads // tp_size
        per_group = architecture.num_heads // architecture.num_kv_heads
        parts = []
        for name, heads in zip(weight.hf, (groups * per_group, groups, groups), strict=True):
            rows = heads * architecture.head_dim
            part = read(name, 0, tp_rank * rows, (tp_rank + 1) * rows)
            parts.append(part.reshape(groups, -1, *part.shape[1:]))
        joined = torch.cat(parts, dim=1)
        yield everything, joined.reshape(-1, *joined.shape[2:])
    elif weight.layout == "gate_up":
        rows = shape[0] // 2
        for half, name in enumerate(weight.hf):
            yield slice(half * rows, (half + 1) * rows), read(name, 0, tp_rank * rows, (tp_rank + 1) * rows)
    elif weight.tp_dim is None:
        yield everything, read(weight.hf[0], None, 0, 0)
    elif not weight.is_vocabulary:
        size = shape[weight.tp_dim]
        yield everything, read(weight.hf[0], weight.tp_dim, tp_rank * size, (tp_rank + 1) * size)
    else:
        first = tp_rank * shape[0]
        real = min(shape[0], max(0, architecture.vocab_size - first))
        step = max(1, PIECE_BYTES // (shape[1] * weight.parameter.element_size()))
        for start in range(0, real, step):
            stop = min(start + step, real)
            yield slice(start, stop), read(weight.hf[0], 0, first + start, first + stop)
        if real < shape[0]:
            yield slice(real, shape[0]), torch.zeros(shape[0] - real, shape[1], dtype=weight.parameter.dtype)


@torch.no_grad()
def export_weights(
    weights: list[BoundWeight],
    architecture: Architecture,
    tp_group: dist.ProcessGroup,
    tp_size: int,
    pp_group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor), one parameter at a time; each is an all-gather over `tp_group`.

    If the weights come from several pipeline stages (`Policy.model_weights`), each is first broadcast over
    `pp_group` from the first stage that holds it.
    """
    device = next(weight.parameter.device for weight in weights if weight.is_local)
    for weight in weights:
        shards = _gather(_from_stage(weight, pp_group, device), tp_group, tp_size)
        if weight.layout == "qkv":
            yield from zip(weight.hf, _split_qkv(torch.cat(shards), architecture), strict=True)
        elif weight.layout == "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            for position, name in enumerate(weight.hf):
                yield name, torch.cat([half[position] for half in halves])
        else:
            tensor = shards[0] if weight.tp_dim is None else torch.cat(shards, dim=weight.tp_dim)
            yield weight.hf[0], tensor[: architecture.vocab_size] if weight.is_vocabulary else tensor


def _bind(
    rule: WeightRule, name: str, parameter: nn.Parameter, hf_prefix: str, engine_prefix: str
) -> BoundWeight:
    is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    hf = tuple(hf_prefix + suffix for suffix in rule.hf)
    return BoundWeight(
        name, parameter, hf, engine_prefix + rule.engine, rule.layout, rule.tp_dim, is_vocabulary
    )


def _from_stage(weight: BoundWeight, pp_group: dist.ProcessGroup | None, device: torch.device) -> BoundWeight:
    """Broadcast the weight over `pp_group` from the first stage that holds it; return it on this rank's
    `device`."""
    if pp_group is None or pp_group.size() == 1:
        return weight
    # Receive into a new tensor: a tied embedding has a parameter on two stages, and the broadcast must not
    # overwrite one.
    values = weight.parameter.detach()
    if pp_group.rank() != weight.stages[0]:
        values = torch.empty(values.shape, dtype=values.dtype, device=device)
    dist.broadcast(values, src=dist.get_process_group_ranks(pp_group)[weight.stages[0]], group=pp_group)
    return replace(weight, parameter=nn.Parameter(values, requires_grad=False))


def _gather(weight: BoundWeight, tp_group: dist.ProcessGroup, tp_size: int) -> list[torch.Tensor]:
    local = weight.parameter.detach()
    if weight.tp_dim is None or tp_size == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(tp_size)]
    dist.all_gather(shards, local.contiguous(), group=tp_group)
    return shards


def _split_qkv(tensor: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    index = qkv_row_index(architecture.num_heads, architecture.num_kv_heads, architecture.head_dim)
    rows = [architecture.num_heads, architecture.num_kv_heads, architecture.num_kv_heads]
    return list(tensor[index.to(tensor.device)].split([count * architecture.head_dim for count in rows]))
