"""The plan of a hot swap: every engine tensor is the trainer's storage or made of blocks that are; nothing is
left over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.weight_sync.plan import Place, SwapPlan, build_plan
from rlsc_mcore.weight_sync.verify import RowSampler, SwapMismatch, compare_with_tensors
from tests.unit.test_weight_map import FUSED_NORMS, TORCH_NORMS, Shape, bound_ranks, dense_shard, hf_tensors

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def engine_tensors(a: Architecture, rank: int, tp: int) -> dict[str, torch.Tensor]:
    """One rank's vLLM parameters from the whole model: [q; k; v] and [gate; up] of the rank's own rows."""
    tensors = hf_tensors(a)
    engine = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".self_attn.")
        if rest.startswith("q_proj"):
            kind = rest.split(".")[1]
            parts = [tensors[f"{layer}.self_attn.{letter}_proj.{kind}"].chunk(tp)[rank] for letter in "qkv"]
            engine[f"{layer}.self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        elif rest.startswith(("k_proj", "v_proj")) or "mlp.up_proj" in name:
            continue
        elif "mlp.gate_proj" in name:
            parts = [tensors[name.replace("gate", half)].chunk(tp)[rank] for half in ("gate", "up")]
            engine[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
        elif "o_proj" in name or "down_proj" in name:
            engine[name] = tensor.chunk(tp, dim=1)[rank]
        elif "embed_tokens" in name or "lm_head" in name:
            padded = torch.zeros(a.padded_vocab_size(tp), a.hidden_size, dtype=tensor.dtype)
            padded[: a.vocab_size] = tensor
            engine[name] = padded.chunk(tp)[rank]
        else:
            engine[name] = tensor
    return engine


def place_of(rank: int, tp: int, engine_tp: int, first: int = 0) -> Place:
    """Rank `rank` of the trainer group whose first rank of the world is `first`."""
    return Place(rank, tp, engine_tp, tuple((first + r) % engine_tp for r in range(tp)))


def trainer_ranks(a: Architecture, tp: int, norms: tuple[str, str] = TORCH_NORMS) -> list[list[object]]:
    ranks = bound_ranks(a, tp, norms)
    tensors = hf_tensors(a)
    for rank, weights in enumerate(ranks):
        for weight in weights:
            weight.parameter.data.copy_(dense_shard(weight.name, tensors, a, rank, tp))
    return ranks


def shapes_of(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def made_by(
    plan: SwapPlan, ranks: list[list[object]], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a rank's engine holds after the plan was carried out, block by block."""
    made = {item.engine_name: item.source for item in plan.aliases}
    for item in plan.copies:
        shards = [
            next(w for w in weights if w.engine == item.engine_name).parameter.data for weights in ranks
        ]
        made[item.engine_name] = torch.full_like(wanted[item.engine_name], -1.0)
        for block in item.blocks:
            source = shards[block.source_rank].narrow(item.axis, block.source_start, block.length)
            made[item.engine_name].narrow(item.axis, block.target_start, block.length).copy_(source)
    return made


NAMES = st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
LAYOUTS = [(1, 1), (2, 2), (4, 4), (2, 1), (4, 1), (4, 2), (1, 2), (1, 4), (2, 4)]


@pytest.mark.parametrize(("tp", "engine_tp"), LAYOUTS, ids=[f"{tp}-to-{engine}" for tp, engine in LAYOUTS])
@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3), per_group=st.integers(1, 3), dim=st.integers(1, 4), ffn=st.integers(1, 3), vocab=st.integers(1, 200),
    tied=st.booleans(), fused=st.booleans(), name=NAMES,
)  # fmt: skip
def test_the_plan_makes_the_engines_tensors(
    tp: int,
    engine_tp: int,
    groups: int,
    per_group: int,
    dim: int,
    ffn: int,
    vocab: int,
    tied: bool,
    fused: bool,
    name: str,
) -> None:
    a = Shape(max(tp, engine_tp), per_group, groups, dim, 8, ffn, vocab, 2, tied, name).architecture()
    ranks = trainer_ranks(a, tp, FUSED_NORMS if fused else TORCH_NORMS)
    for first in range(0, max(tp, engine_tp), tp):  # every trainer group that an engine spans
        for rank in range(tp):
            place = place_of(rank, tp, engine_tp, first)
            wanted = engine_tensors(a, place.engine_rank, engine_tp)
            plan = build_plan(ranks[rank], a, shapes_of(wanted), place)
            made = made_by(plan, ranks, wanted)
            assert made.keys() == wanted.keys()
            for key, tensor in wanted.items():
                assert torch.equal(made[key], tensor), f"rank {rank} of the group from {first}: {key}"
            for (
                item
            ) in plan.copies:  # no element is written twice, and none of another rank's blocks is forgotten
                assert sum(block.length for block in item.blocks) == wanted[item.engine_name].shape[item.axis]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_equal_sizes_alias_everything_but_what_megatron_interleaves(groups: int, tp: int) -> None:
    a = Shape(tp, 3, groups, 2, 8, 2, 130, 2, True, "Qwen2ForCausalLM").architecture()
    ranks = trainer_ranks(a, tp)
    plan = build_plan(ranks[0], a, shapes_of(engine_tensors(a, 0, tp)), place_of(0, tp, tp))
    # One query group per rank makes both layouts equal: then nothing needs to move.
    assert len(plan.copies) == (2 * a.num_layers if groups > 1 else 0)
    assert all("qkv" in item.engine_name for item in plan.copies)
    assert not plan.moved


def test_what_another_layout_costs() -> None:
    """Norms are aliased everywhere, rows of the embedding where the engine has more ranks; the rest is copied
    or gathered."""
    a = Shape(4, 2, 1, 4, 8, 4, 256, 2, False, "Qwen3ForCausalLM").architecture()
    down = build_plan(trainer_ranks(a, 4)[3], a, shapes_of(engine_tensors(a, 0, 1)), place_of(3, 4, 1))
    assert down.moved
    assert {item.engine_name.rsplit(".", 2)[-2] for item in down.aliases} == {
        "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm",
    }  # fmt: skip
    up = build_plan(trainer_ranks(a, 1)[0], a, shapes_of(engine_tensors(a, 3, 4)), place_of(0, 1, 4, first=3))
    assert not up.moved
    # One query group per engine rank lies in one piece of Megatron's shard: q, k, v, as vLLM wants it.
    assert {"embed_tokens", "lm_head", "qkv_proj"} <= {
        item.engine_name.rsplit(".", 2)[-2] for item in up.aliases
    }
    assert {item.engine_name.rsplit(".", 2)[-2] for item in up.copies} == {
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }


def test_another_type_is_copied() -> None:
    a = Shape(1, 2, 1, 2, 8, 2, 64, 1, True, "Qwen2ForCausalLM").architecture()
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in engine_tensors(a, 0, 1).items()}
    plan = build_plan(trainer_ranks(a, 1)[0], a, shapes_of(wanted), place_of(0, 1, 1))
    assert not plan.aliases
    assert {item.engine_name for item in plan.copies} == wanted.keys()
    assert plan.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes.pop("model.norm.weight"), r"engine has no parameter model\.norm\.weight"),
        (
            lambda shapes: shapes.update({"model.rotary.weight": (torch.Size([2]), torch.float64)}),
            r"nothing for the engine's model\.rotary",
        ),
        (
            lambda shapes: shapes.update({"model.norm.weight": (torch.Size([9]), torch.float64)}),
            r"model\.norm\.weight is \(9,\)",
        ),
        (
            lambda shapes: shapes.update({"model.norm.weight": (torch.Size([8]), torch.bfloat16)}),
            r"of several types: torch\.bfloat16",
        ),
    ],
    ids=["missing", "left over", "shape", "type"],
)
def test_a_parameter_that_does_not_match_is_named(change: object, message: str) -> None:
    a = Shape(1, 2, 2, 2, 8, 2, 64, 1, True, "Qwen2ForCausalLM").architecture()
    shapes = shapes_of(engine_tensors(a, 0, 1))
    change(shapes)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        build_plan(bound_ranks(a, 1, TORCH_NORMS)[0], a, shapes, place_of(0, 1, 1))


def test_a_plan_holds_the_parameters_themselves() -> None:
    """An optimizer step in place must be visible without another plan."""
    a = Shape(1, 2, 2, 2, 8, 2, 64, 1, True, "Qwen2ForCausalLM").architecture()
    weights = bound_ranks(a, 1, TORCH_NORMS)[0]
    plan = build_plan(weights, a, shapes_of(engine_tensors(a, 0, 1)), place_of(0, 1, 1))
    pointers = {weight.engine: weight.parameter.data_ptr() for weight in weights}
    for item in (*plan.aliases, *plan.copies):
        assert item.source.data_ptr() == pointers[item.engine_name]
        assert not item.source.requires_grad


# ---------------------------------------------------------------- what verifies a swap


@pytest.mark.parametrize(("tp", "engine_tp"), LAYOUTS, ids=[f"{tp}-to-{engine}" for tp, engine in LAYOUTS])
@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sampled_rows_are_those_of_the_hugging_face_tensors(tp: int, engine_tp: int, name: str) -> None:
    a = Shape(max(tp, engine_tp), 2, 2, 3, 8, 2, 150, 2, False, name).architecture()
    tensors, ranks = hf_tensors(a), trainer_ranks(a, tp)
    seen: set[str] = set()
    held = dict.fromkeys(tensors, 0)
    for swap_number in range(4):
        for rank in range(tp):
            place = place_of(rank, tp, engine_tp)
            engine = engine_tensors(a, place.engine_rank, engine_tp)
            for sample in RowSampler(ranks[rank], a, place).rows(swap_number):
                seen.add(sample.name)
                whole = tensors[sample.name][sample.row]
                for row, shard, size, share in (
                    (sample.trainer_row, sample.weight.parameter.data, tp, rank),
                    (sample.engine_row, engine[sample.weight.engine], engine_tp, place.engine_rank),
                ):
                    if row is None:
                        continue
                    part = whole.chunk(size)[share] if sample.weight.tp_dim == 1 else whole
                    assert torch.equal(shard[row], part), (sample.name, sample.row)
                    held[sample.name] += 1
    assert seen == tensors.keys()  # all of them in turn
    assert all(held.values())


def test_the_full_comparison_names_the_first_difference() -> None:
    a = Shape(2, 2, 1, 2, 8, 2, 100, 1, True, "Qwen2ForCausalLM").architecture()
    tensors, ranks = hf_tensors(a), trainer_ranks(a, 1)
    place = place_of(0, 1, 2, first=1)
    engine = engine_tensors(a, 1, 2)
    stream = [(name, tensors[name]) for weight in ranks[0] for name in weight.hf]
    assert compare_with_tensors(engine, ranks[0], iter(stream), place, 5) == len(ranks[0])
    engine["model.embed_tokens.weight"][100 - 64 :] = 7.0  # padding may hold anything
    assert compare_with_tensors(engine, ranks[0], iter(stream), place, 5) == len(ranks[0])
    engine["model.layers.0.mlp.down_proj.weight"][3, 1] = 0.25
    left = iter(stream)
    with pytest.raises(
        SwapMismatch,
        match=r"rank 5: model\.layers\.0\.mlp\.down_proj\.weight\[3, 1\] is 0\.25 in the engine, .* \(1 of 16",
    ):
        compare_with_tensors(engine, ranks[0], left, place, 5)
    assert next(left, None) is None  # all of it was taken: the gathers behind it are collective
