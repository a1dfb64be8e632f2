"""Spreading sequences over ranks: against brute force, a counter of FLOPs, and what must hold of every
plan."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.data.balance import LOCALITY_TOLERANCE, CostModel, assign, imbalance, loads
from rlsc_mcore.model.shape import Architecture

SHAPE = Architecture(
    name="Qwen2ForCausalLM",
    num_layers=2,
    hidden_size=96,
    ffn_hidden_size=160,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=128,
    norm_epsilon=1e-6,
    rotary_base=10000.0,
    rope_scaling_factor=None,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    ranks = draw(st.integers(1, 5))
    costs = draw(st.lists(st.integers(1, 1000), min_size=0, max_size=40))
    return [float(cost) for cost in costs], [draw(st.integers(0, ranks - 1)) for _ in costs], ranks


@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_no_rank_exceeds_the_mean_by_more_than_a_sequence(
    problem: tuple[list[float], list[int], int],
) -> None:
    costs, owners, ranks = problem
    plan = assign(costs, owners, ranks)
    assert len(plan) == len(costs) and all(0 <= rank < ranks for rank in plan)
    totals = loads(costs, plan, ranks)
    assert sum(totals) == sum(costs)
    assert max(totals) <= sum(costs) / ranks + max(costs, default=0.0)
    assert imbalance(totals) >= -1e-12
    assert plan == assign(list(costs), list(owners), ranks)


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=7), seed=st.integers(0, 3**7 - 1))
def test_near_the_best_of_all_plans(costs: list[int], seed: int) -> None:
    owners = [seed // 3**i % 3 for i in range(len(costs))]
    plan = assign([float(cost) for cost in costs], owners, 3)
    best = min(max(loads(costs, ranks, 3)) for ranks in itertools.product(range(3), repeat=len(costs)))
    # Graham's bound for longest-first on 3 ranks: 4/3 - 1/9.
    assert max(loads(costs, plan, 3)) <= (1 + LOCALITY_TOLERANCE) * (4 / 3 - 1 / 9) * best + 1e-9


def test_what_is_balanced_does_not_move() -> None:
    owners = [0, 1, 2, 3] * 8
    assert assign([5.0] * 32, owners, 4) == owners


def test_only_the_surplus_moves() -> None:
    owners = [0] * 30 + [1] * 10
    plan = assign([1.0] * 40, owners, 2)
    assert loads([1.0] * 40, plan, 2) == [20.0, 20.0]
    assert sum(a != b for a, b in zip(owners, plan, strict=True)) == 10


def test_imbalance_is_the_straggler_s_surplus() -> None:
    assert imbalance([2.0, 2.0]) == 0.0
    assert imbalance([3.0, 1.0]) == pytest.approx(0.5)
    assert imbalance([0.0, 0.0]) == 0.0


def test_flops_written_out() -> None:
    cost = CostModel(per_token=10.0, per_token_pair=1.0, per_trained_token=100.0)
    assert cost.flops(4, 3) == 4 * 10 + 10 + 300


def test_cost_model_counts_what_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from rlsc_mcore.parallel.packages import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    length = 48
    with FlopCounterMode(display=False) as counter:
        Qwen2ForCausalLM(config)(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    ours = SHAPE.cost_model()
    # The eager oracle multiplies every pair of tokens, ours the causal half; rotary tables are the oracle's
    # alone.
    forward = (ours.per_token + ours.per_trained_token) * length / 3 + ours.per_token_pair * length**2 / 3
    assert counter.get_total_flops() == pytest.approx(forward, rel=1e-3)
