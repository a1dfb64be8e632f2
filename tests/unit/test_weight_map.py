"""The weight map against plain slicing of whole tensors: Hugging Face -> every rank's shard -> Hugging
Face."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlsc_mcore.model import weight_map
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, bind_weights, export_weights, qkv_row_index, shard_pieces


@dataclass(frozen=True)
class Shape:
    """A small decoder; everything divides by `tp`."""

    tp: int
    heads_per_group: int
    groups_per_rank: int
    head_dim: int
    hidden: int
    ffn_per_rank: int
    vocab: int
    layers: int
    tied: bool
    name: str

    def architecture(self) -> Architecture:
        kv = self.groups_per_rank * self.tp
        return Architecture(
            name=self.name,
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn_per_rank * self.tp,
            num_heads=kv * self.heads_per_group,
            num_kv_heads=kv,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            max_position_embeddings=16,
            norm_epsilon=1e-6,
            rotary_base=1e4,
            rope_scaling_factor=None,
            tied_embeddings=self.tied,
            qkv_bias=self.name == "Qwen2ForCausalLM",
            qk_norm=self.name == "Qwen3ForCausalLM",
        )


SHAPES = st.builds(
    Shape,
    tp=st.sampled_from([1, 2, 4]),
    heads_per_group=st.integers(1, 4),
    groups_per_rank=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    hidden=st.sampled_from([4, 8, 12]),
    ffn_per_rank=st.integers(1, 3),
    vocab=st.sampled_from([1, 63, 64, 65, 130]),
    layers=st.integers(1, 2),
    tied=st.booleans(),
    name=st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"]),
)


def hf_tensors(a: Architecture) -> dict[str, torch.Tensor]:
    """A whole model in Hugging Face's names, every element different."""
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
    }
    if not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    for layer in range(a.num_layers):
        p = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, a.hidden_size)
            if a.qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        if a.qk_norm:
            shapes[f"{p}self_attn.q_norm.weight"] = shapes[f"{p}self_attn.k_norm.weight"] = (a.head_dim,)
        shapes[f"{p}self_attn.o_proj.weight"] = (a.hidden_size, q)
        shapes[f"{p}input_layernorm.weight"] = shapes[f"{p}post_attention_layernorm.weight"] = (
            a.hidden_size,
        )
        shapes[f"{p}mlp.gate_proj.weight"] = shapes[f"{p}mlp.up_proj.weight"] = (
            a.ffn_hidden_size,
            a.hidden_size,
        )
        shapes[f"{p}mlp.down_proj.weight"] = (a.hidden_size, a.ffn_hidden_size)
    tensors, start = {}, 1.0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        tensors[name] = torch.arange(start, start + size, dtype=torch.float64).reshape(shape)
        start += size
    return tensors


def megatron_shapes(a: Architecture, tp: int, names: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """One rank's parameters as Megatron-Core names and shapes them; `names` are those of the two norms of a
    layer."""
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // tp
    rows = a.padded_vocab_size(tp) // tp
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (rows, a.hidden_size)}
    for layer in range(a.num_layers):
        p = f"decoder.layers.{layer}."
        shapes[p + names[0]] = shapes[p + names[1]] = (a.hidden_size,)
        shapes[p + "self_attention.linear_proj.weight"] = (a.hidden_size, a.num_heads * a.head_dim // tp)
        shapes[p + "self_attention.linear_qkv.weight"] = (qkv, a.hidden_size)
        if a.qkv_bias:
            shapes[p + "self_attention.linear_qkv.bias"] = (qkv,)
        if a.qk_norm:
            shapes[p + "self_attention.q_layernorm.weight"] = shapes[
                p + "self_attention.k_layernorm.weight"
            ] = (a.head_dim,)
        shapes[p + "mlp.linear_fc1.weight"] = (2 * a.ffn_hidden_size // tp, a.hidden_size)
        shapes[p + "mlp.linear_fc2.weight"] = (a.hidden_size, a.ffn_hidden_size // tp)
    shapes["decoder.final_layernorm.weight"] = (a.hidden_size,)
    if not a.tied_embeddings:
        shapes["output_layer.weight"] = (rows, a.hidden_size)
    return shapes


class _Named(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.tensors = {
            name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()
        }

    def named_parameters(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        return iter(self.tensors.items())


TORCH_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
FUSED_NORMS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")


def bound_ranks(a: Architecture, tp: int, names: tuple[str, str]) -> list[list[BoundWeight]]:
    return [bind_weights(_Named(megatron_shapes(a, tp, names)), a) for _ in range(tp)]


def dense_shard(
    name: str, tensors: dict[str, torch.Tensor], a: Architecture, rank: int, tp: int
) -> torch.Tensor:
    """What Megatron's rank holds, by slicing whole tensors head by head."""
    layer = ".".join(name.split(".")[:3]).replace("decoder.", "model.") + "."
    if "linear_qkv.weight" in name or "linear_qkv.bias" in name:
        kind, per_group = name.rsplit(".", 1)[1], a.num_heads // a.num_kv_heads
        parts = {letter: tensors[f"{layer}self_attn.{letter}_proj.{kind}"] for letter in "qkv"}
        rows = []
        for group in range(rank * a.num_kv_heads // tp, (rank + 1) * a.num_kv_heads // tp):
            d = a.head_dim
            rows += [
                parts["q"][head * d : (head + 1) * d]
                for head in range(group * per_group, (group + 1) * per_group)
            ]
            rows += [parts[letter][group * d : (group + 1) * d] for letter in "kv"]
        return torch.cat(rows)
    if "linear_fc1.weight" in name:
        return torch.cat(
            [tensors[f"{layer}mlp.{half}_proj.weight"].chunk(tp)[rank] for half in ("gate", "up")]
        )
    if "linear_fc2" in name:
        return tensors[f"{layer}mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
    if "linear_proj" in name:
        return tensors[f"{layer}self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
    if "embeddings" in name or "output_layer" in name:
        whole = tensors["model.embed_tokens.weight" if "embeddings" in name else "lm_head.weight"]
        padded = torch.zeros(a.padded_vocab_size(tp), a.hidden_size, dtype=whole.dtype)
        padded[: a.vocab_size] = whole
        return padded.chunk(tp)[rank]
    if "final_layernorm" in name:
        return tensors["model.norm.weight"]
    if "q_layernorm" in name or "k_layernorm" in name:
        return tensors[f"{layer}self_attn.{name.split('.')[-2][0]}_norm.weight"]
    return tensors[
        layer
        + (
            "input_layernorm.weight"
            if "qkv" in name or "input" in name
            else "post_attention_layernorm.weight"
        )
    ]


def reader(tensors: dict[str, torch.Tensor], touched: list[tuple[str, int]]) -> weight_map.ReadSlice:
    def read(name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = tensors[name]
        if dim is None:
            return tensor
        touched.append((name, stop - start))
        assert 0 <= start < stop <= tensor.shape[dim]
        return tensor.narrow(dim, start, stop - start)

    return read


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, norms=st.sampled_from([TORCH_NORMS, FUSED_NORMS]))
def test_every_rank_reads_its_shard_and_export_restores_the_whole(
    shape: Shape, norms: tuple[str, str]
) -> None:
    a, tp = shape.architecture(), shape.tp
    tensors = hf_tensors(a)
    ranks = bound_ranks(a, tp, norms)
    for rank, weights in enumerate(ranks):
        for weight in weights:
            touched: list[tuple[str, int]] = []
            shard = torch.full_like(weight.parameter.data, float("nan"))  # every row must be written
            for rows, piece in shard_pieces(weight, a, reader(tensors, touched), rank, tp):
                shard[rows] = piece
            torch.testing.assert_close(shard, dense_shard(weight.name, tensors, a, rank, tp), rtol=0, atol=0)
            assert shard.shape == weight.parameter.shape
            for name, size in touched:  # no rank reads more than its own slice
                assert size * tp <= max(tensors[name].shape[weight.tp_dim or 0], a.padded_vocab_size(tp))
            weight.parameter.data.copy_(shard)

    def gather(weight: BoundWeight, tp_group: object, tp_size: int) -> list[torch.Tensor]:
        same = [next(other for other in other_rank if other.name == weight.name) for other_rank in ranks]
        return [other.parameter.detach() for other in (same if weight.tp_dim is not None else same[:1])]

    # The collective is what the distributed tests run for real; here its result is put together from the
    # ranks' own shards.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_map, "_gather", gather)
        exported = dict(export_weights(ranks[0], a, None, tp))  # type: ignore[arg-type]
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(exported[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 5), per_group=st.integers(1, 5), head_dim=st.integers(1, 6))
def test_qkv_rows_by_slicing(groups: int, per_group: int, head_dim: int) -> None:
    heads = groups * per_group
    megatron = torch.arange((heads + 2 * groups) * head_dim)
    stride = (per_group + 2) * head_dim
    queries, keys, values = [], [], []
    for group in range(groups):
        block = megatron[group * stride : (group + 1) * stride]
        queries.append(block[: per_group * head_dim])
        keys.append(block[per_group * head_dim : (per_group + 1) * head_dim])
        values.append(block[(per_group + 1) * head_dim :])
    index = qkv_row_index(heads, groups, head_dim)
    assert torch.equal(megatron[index], torch.cat([*queries, *keys, *values]))
    assert sorted(index.tolist()) == megatron.tolist()  # a permutation: no row lost, none twice


def test_a_parameter_without_a_rule_is_an_error() -> None:
    shape = Shape(1, 1, 1, 2, 4, 1, 8, 1, True, "LlamaForCausalLM").architecture()
    shapes = megatron_shapes(shape, 1, TORCH_NORMS) | {"decoder.layers.0.mlp.router.weight": (2, 2)}
    with pytest.raises(AssertionError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        bind_weights(_Named(shapes), shape)


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(300, 1, 320), (300, 2, 320), (320, 4, 320), (321, 1, 384), (64, 3, 192)]
)
def test_padded_vocabulary(vocab: int, tp: int, padded: int) -> None:
    shape = Shape(1, 1, 1, 2, 4, 1, vocab, 1, True, "LlamaForCausalLM").architecture()
    assert shape.padded_vocab_size(tp) == padded
