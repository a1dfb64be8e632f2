"""The exchange of a hot swap between ranks of unequal layouts, on gloo, without an engine: tensors against the dense model."""

from typing import Any

import pytest
import torch

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.weight_sync.exchange import WeightExchange
from rlsc_mcore.weight_sync.plan import build_plan
from rlsc_mcore.weight_sync.verify import RowSampler, compare_checksums
from tests.helpers.ranks import run_ranks
from tests.unit.test_swap_plan import engine_tensors, place_of, shapes_of, trainer_ranks
from tests.unit.test_weight_map import Shape


def exchange(tp: int, engine_tp: int, a: Architecture, bucket_bytes: int, dtype: torch.dtype) -> dict[str, Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, dist.get_world_size(), tp)]
    group, tp_rank = groups[rank // tp], rank % tp
    place = place_of(tp_rank, tp, engine_tp, first=rank - tp_rank)
    weights = trainer_ranks(a, tp)[tp_rank]
    for weight in weights:
        weight.parameter.data = weight.parameter.data.to(torch.float32)
    wanted = {name: tensor.to(dtype) for name, tensor in engine_tensors(a, place.engine_rank, engine_tp).items()}
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
                        tensors[item.engine_name].narrow(item.axis, block.target_start, block.length).mul_(scale)
            moved.run()
            outcome["wrong"] += [name for name, tensor in wanted.items() if not torch.equal(engine[name], tensor * scale)]
            outcome["differing"] = [row.name for row in compare_checksums(sampled, engine, place, group, dtype)]
    with torch.no_grad():  # a row that one rank's engine has wrong is named there and nowhere else
        damaged = next(name for name in tensors if "down_proj" in name)
        if rank == 1:
            tensors[damaged] += 1
        outcome["damaged"] = sorted({row.weight.engine for row in compare_checksums(sampled, engine, place, group, dtype)})
    return outcome


@pytest.mark.parametrize(
    ("world", "tp", "engine_tp", "bucket_bytes"),
    [(2, 2, 1, 1 << 20), (2, 2, 1, 200), (4, 4, 1, 1000), (4, 4, 2, 1000), (4, 2, 4, 300), (4, 2, 1, 1 << 20)],
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


def test_bfloat16_engine_of_a_float32_trainer() -> None:
    a = Shape(2, 2, 1, 4, 16, 3, 100, 1, True, "Qwen3ForCausalLM").architecture()
    for rank in run_ranks(2, exchange, 2, 1, a, 1000, torch.bfloat16):
        assert rank["wrong"] == []
        assert rank["differing"] == []
