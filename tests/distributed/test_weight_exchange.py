"""The exchange of a hot swap between ranks of unequal layouts, on gloo, without an engine: tensors against
the dense model."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.weight_map import BoundWeight, describe_weights, join_stages
from rlsc_mcore.weight_sync.exchange import WeightExchange
from rlsc_mcore.weight_sync.plan import Place, build_plan
from rlsc_mcore.weight_sync.verify import RowSampler, compare_checksums
from tests.helpers.ranks import run_ranks
from tests.unit.test_swap_plan import engine_tensors, place_of, shapes_of, trainer_ranks
from tests.unit.test_weight_map import Shape


def exchange(
    tp: int, engine_tp: int, a: Architecture, bucket_bytes: int, dtype: torch.dtype
) -> dict[str, Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, dist.get_world_size(), tp)]
    group, tp_rank = groups[rank // tp], rank % tp
    place = place_of(tp_rank, tp, engine_tp, first=rank - tp_rank)
    weights = trainer_ranks(a, tp)[tp_rank]
    for weight in weights:
        weight.parameter.data = weight.parameter.data.to(torch.float32)
    wanted = {
        name: tensor.to(dtype) for name, tensor in engine_tensors(a, place.engine_rank, engine_tp).items()
    }
    plan = build_plan(weights, a, shapes_of(wanted), place)
    tensors = {item.engine_name: torch.full_like(wanted[item.engine_name], -1.0) for item in plan.copies}
    for item in plan.copies:
        for block in item.blocks:
            if block.source_rank == tp_rank:
                source = item.source.narrow(item.axis, block.source_start, block.length)
                tensors[item.engine_name].narrow(item.axis, block.target_start, block.length).copy_(source)
    outcome: dict[str, Any] = {"gathers": bool(plan.moved), "wrong": []}
    engine = {**{item.engine_name: item.source for item in plan.aliases}, **tensors}
    sampled = [row for number in range(3) for row in RowSampler(weights, a, place).rows(number)]
    outcome["before"] = len(compare_checksums(sampled, engine, place, group, dtype))
    if plan.moved:
        moved = WeightExchange(plan, tensors, group, bucket_bytes)
        outcome["buckets"], outcome["bytes"] = moved.num_buckets, moved.buffer_bytes
        for scale in (1.0, 2.0):  # a second swap after the weights changed
            for weight in weights:
                weight.parameter.data.mul_(scale)
            for item in plan.copies:
                for block in item.blocks:
                    if block.source_rank == tp_rank:
                        tensors[item.engine_name].narrow(item.axis, block.target_start, block.length).mul_(
                            scale
                        )
            moved.run()
            outcome["wrong"] += [
                name for name, tensor in wanted.items() if not torch.equal(engine[name], tensor * scale)
            ]
            outcome["differing"] = [
                row.name for row in compare_checksums(sampled, engine, place, group, dtype)
            ]
    with torch.no_grad():  # a row that one rank's engine has wrong is named there and nowhere else
        damaged = next(name for name in tensors if "down_proj" in name)
        if rank == 1:
            tensors[damaged] += 1
        outcome["damaged"] = sorted(
            {row.weight.engine for row in compare_checksums(sampled, engine, place, group, dtype)}
        )
    return outcome


@pytest.mark.parametrize(
    ("world", "tp", "engine_tp", "bucket_bytes"),
    [
        (2, 2, 1, 1 << 20),
        (2, 2, 1, 200),
        (4, 4, 1, 1000),
        (4, 4, 2, 1000),
        (4, 2, 4, 300),
        (4, 2, 1, 1 << 20),
    ],
)
def test_every_engine_tensor_arrives(world: int, tp: int, engine_tp: int, bucket_bytes: int) -> None:
    a = Shape(max(tp, engine_tp), 2, 2, 4, 16, 3, 150, 2, world == 2, "Qwen2ForCausalLM").architecture()
    ranks = run_ranks(world, exchange, tp, engine_tp, a, bucket_bytes, torch.float32)
    assert sum(rank["before"] for rank in ranks) > 0  # before the exchange, sampled rows differ
    for number, rank in enumerate(ranks):
        assert rank["gathers"]
        assert rank["wrong"] == []
        assert rank["differing"] == []
        assert rank["buckets"] == ranks[0]["buckets"]
        assert (rank["damaged"] != []) == (number == 1)
    if bucket_bytes < 1000:
        assert ranks[0]["buckets"] > 2  # both buffers were used more than once
        assert ranks[0]["bytes"] < 100 * bucket_bytes


def staged(a: Architecture, tp: int, stage: int, tp_rank: int) -> list[BoundWeight]:
    """All weights as a rank of a two-stage trainer has them: the first half of the layers and the embedding,
    or the rest."""
    whole = [
        replace(weight, parameter=nn.Parameter(weight.parameter.detach().float(), requires_grad=False))
        for weight in trainer_ranks(a, tp)[tp_rank]
    ]
    halves: list[list[BoundWeight]] = [[], []]
    for weight in whole:
        layer = re.search(r"layers\.(\d+)\.", weight.engine)
        last = int(layer[1]) >= a.num_layers // 2 if layer else "embed" not in weight.engine
        halves[last].append(weight)
        if weight.engine == "model.embed_tokens.weight" and a.tied_embeddings:
            copy = nn.Parameter(weight.parameter.detach().clone(), requires_grad=False)
            halves[1].append(replace(weight, parameter=copy, name="output_layer.weight"))
    return join_stages(halves[stage], stage, [describe_weights(half) for half in halves])


def exchange_stages(tp: int, engine_tp: int, a: Architecture, fault: str) -> dict[str, Any]:
    """Swap between two stages of `tp` ranks; with a fault: a plan shifted by one layer, or a stage that sends
    old weights."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stage, tp_rank = divmod(rank, tp)
    place = Place(tp_rank, tp, engine_tp, tuple(r % engine_tp for r in range(2 * tp)), stage, 2)
    weights = staged(a, tp, stage, tp_rank)
    wanted = {
        name: tensor.float() for name, tensor in engine_tensors(a, place.engine_rank, engine_tp).items()
    }
    plan = build_plan(weights, a, shapes_of(wanted), place)
    tensors = {item.engine_name: torch.full_like(wanted[item.engine_name], -1.0) for item in plan.copies}
    engine = {**{item.engine_name: item.source for item in plan.aliases}, **tensors}
    if fault == "shifted":
        sources = {item.engine_name: item.source for item in plan.moved}
        following = {name: re.sub(r"layers\.2\.", "layers.3.", name) for name in sources}
        plan = replace(
            plan,
            moved=tuple(replace(item, source=sources[following[item.engine_name]]) for item in plan.moved),
        )

    def copy_own() -> None:
        for item in plan.copies:
            for block in item.blocks:
                if block.source_rank == place.member:
                    source = item.source.narrow(item.axis, block.source_start, block.length)
                    tensors[item.engine_name].narrow(item.axis, block.target_start, block.length).copy_(
                        source
                    )

    moved = WeightExchange(plan, tensors, dist.group.WORLD, 2000)
    for scale in (1.0, 2.0):
        for weight in weights:
            if weight.is_local:
                weight.parameter.data.mul_(scale)
        copy_own()
        if scale == 1.0 or fault != "stale":
            moved.run()
    sampled = RowSampler(weights, a, place).rows(1)
    return {
        "wrong": [name for name, tensor in wanted.items() if not torch.equal(engine[name], tensor * 2.0)],
        "differing": [
            row.name for row in compare_checksums(sampled, engine, place, dist.group.WORLD, torch.float32)
        ],
        "aliased": len(plan.aliases),
        "received": sum(tensors[item.engine_name].nbytes for item in plan.copies if item.source.is_meta),
    }


@pytest.mark.parametrize(
    ("tp", "engine_tp", "tied"), [(1, 1, True), (1, 2, False), (2, 2, True), (2, 1, False)]
)
def test_an_engine_receives_the_other_stages(tp: int, engine_tp: int, tied: bool) -> None:
    a = Shape(2, 2, 2, 4, 16, 3, 150, 4, tied, "Qwen2ForCausalLM").architecture()
    ranks = run_ranks(2 * tp, exchange_stages, tp, engine_tp, a, "")
    for rank in ranks:
        assert rank["wrong"] == rank["differing"] == []
        assert rank["received"] > 0
    if tp == engine_tp:  # of its own stage all but q, k and v is the trainer's bytes
        for number, rank in enumerate(ranks):
            # Two layers of two norms, o, gate and up, down; the embedding; with the last stage the final norm
            # and the head.
            assert rank["aliased"] == 2 * 5 + (1 if number < tp else 2)


@pytest.mark.parametrize("fault", ["shifted", "stale"])
@pytest.mark.parametrize(("tp", "engine_tp"), [(1, 1), (2, 2)])
def test_checksums_see_a_wrong_stage_in_the_same_swap(tp: int, engine_tp: int, fault: str) -> None:
    a = Shape(2, 2, 2, 4, 16, 3, 150, 4, False, "Qwen2ForCausalLM").architecture()
    ranks = run_ranks(2 * tp, exchange_stages, tp, engine_tp, a, fault)
    assert any(rank["wrong"] for rank in ranks)
    for rank in ranks:
        assert bool(rank["wrong"]) == bool(rank["differing"])


def test_bfloat16_engine_of_a_float32_trainer() -> None:
    a = Shape(2, 2, 1, 4, 16, 3, 100, 1, True, "Qwen3ForCausalLM").architecture()
    for rank in run_ranks(2, exchange, 2, 1, a, 1000, torch.bfloat16):
        assert rank["wrong"] == []
        assert rank["differing"] == []
