"""Rollouts change ranks before training: nothing lost, FLOPs equal, few bytes, and the step is the one that a
single rank takes."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import RolloutConfig
from rlsc_mcore.data.balance import CostModel
from rlsc_mcore.data.packing import trained_tokens
from rlsc_mcore.types import Question, Rollout
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

NUM_QUESTIONS, NUM_SAMPLES = 6, 4
OPTIONS = RolloutConfig(num_samples=NUM_SAMPLES)
MARK = partial(trained_tokens, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0}))
COST = CostModel(per_token=3.0, per_token_pair=0.25, per_trained_token=2.0)
PLACES = {(question, 0): question for question in range(NUM_QUESTIONS)}


def everything() -> list[Rollout]:
    return make_rollouts(num_questions=NUM_QUESTIONS, num_samples=NUM_SAMPLES)


def prompts() -> list[tuple[int, ...]]:
    return [
        next(r.prompt_ids for r in everything() if r.question_index == question)
        for question in range(NUM_QUESTIONS)
    ]


def skewed(num_engines: int, engine: int) -> list[Rollout]:
    """What one engine sampled: the first most; the others the odd samples of questions 0 and 3, and the last
    question 5.

    Samples 0 and 1 of question 0 are identical, and lie on different engines.
    """
    owner = {(question, sample): 0 for question in range(NUM_QUESTIONS) for sample in range(NUM_SAMPLES)}
    for question, sample in owner:
        if question == 5:
            owner[question, sample] = num_engines - 1
        elif question in (0, 3) and sample % 2:
            owner[question, sample] = (sample // 2 + 1) % num_engines
    return [
        rollout for rollout in everything() if owner[rollout.question_index, rollout.sample_index] == engine
    ]


def redistributed(groups: Any, rewards: Any = None, cost: CostModel = COST) -> Any:
    from rlsc_mcore.training.redistribute import redistribute

    rollouts = skewed(groups.num_engines, groups.engine_index)
    return redistribute(rollouts, PLACES, OPTIONS, prompts(), MARK, cost, groups, rewards)


def trained_part(num_trained: int) -> tuple[Any, Any]:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.redistribute import redistribute

    groups = initialize_groups(get_backend(), 1)
    rollouts = skewed(groups.num_engines, groups.engine_index)
    options = RolloutConfig(num_samples=NUM_SAMPLES, num_trained=num_trained)
    found = redistribute(rollouts, PLACES, options, prompts(), MARK, COST, groups)
    return [
        (s.rollout.question_index, s.rollout.sample_index, s.multiplicity) for s in found.sequences
    ], found.num_distinct


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_samples_that_only_vote_are_not_trained(num_ranks: int) -> None:
    results = run_ranks(num_ranks, trained_part, 2)
    kept = sorted(row for rows, _ in results for row in rows)
    # Samples 0 and 1 of every question; those of question 0 are identical.
    assert kept == [
        (0, 0, 2),
        *((question, sample, 1) for question in range(1, NUM_QUESTIONS) for sample in (0, 1)),
    ]
    assert {distinct for _, distinct in results} == {
        NUM_QUESTIONS * NUM_SAMPLES - 1
    }  # of all that were sampled


def exchanged(tp: int, engine_tp: int, pp: int) -> tuple[Any, int]:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups

    groups = initialize_groups(get_backend(), tp, engine_tp, pp=pp)
    return redistributed(groups), groups.dp_rank


LAYOUTS = {
    "one": (1, 1, 1, 1), "dp2": (2, 1, 1, 1), "dp3": (3, 1, 1, 1), "tp2-engine1": (2, 2, 1, 1), "dp2-engine2": (2, 1, 2, 1),
    "pp2": (2, 1, 1, 2), "pp2-dp2-engine2": (4, 1, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(("world", "tp", "engine_tp", "pp"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_answer_is_on_one_rank_with_all_its_samples(
    world: int, tp: int, engine_tp: int, pp: int
) -> None:
    results = run_ranks(world, exchanged, tp, engine_tp, pp)
    rollouts = everything()
    by_rank: dict[int, Any] = {}
    for found, dp_rank in results:  # the ranks of a model group hold the same
        assert _same(by_rank.setdefault(dp_rank, found), found)
    assert len(by_rank) == world // (tp * pp)
    sequences = [sequence for found in by_rank.values() for sequence in found.sequences]
    expected = Counter((r.question_index, r.prompt_ids, r.response_ids) for r in rollouts)
    held = {
        (s.rollout.question_index, s.rollout.prompt_ids, s.rollout.response_ids): s.multiplicity
        for s in sequences
    }
    assert len(sequences) == len(expected) == results[0][0].num_sequences
    assert held == expected
    for sequence in sequences:  # the first of identical answers, with its own log-probs
        first = next(
            r
            for r in rollouts
            if (r.question_index, r.response_ids) == (sequence.group, sequence.rollout.response_ids)
        )
        assert (
            sequence.rollout.sample_index == first.sample_index
            and sequence.rollout.engine_log_probs == first.engine_log_probs
        )
        assert sequence.trained == MARK(first) and sequence.rollout.finish_reason == first.finish_reason
    work = [
        sum(
            COST.flops(len(s.rollout.prompt_ids) + len(s.rollout.response_ids), sum(s.trained))
            for s in by_rank[rank].sequences
        )
        for rank in sorted(by_rank)
    ]
    heaviest = max(COST.flops(len(p) + len(r), len(r)) for _, p, r in expected)
    assert max(work) - sum(work) / len(work) <= heaviest
    for found, _ in results:
        assert found.imbalance == pytest.approx(max(work) / (sum(work) / len(work)) - 1, abs=1e-12)
        assert found.num_tokens == sum(len(p) + len(r) for _, p, r in expected)
        assert found.num_tokens_unmerged == sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        first = results[0][0]
        assert (found.moved_share, found.imbalance_sampled) == (first.moved_share, first.imbalance_sampled)
        tokens = [
            sum(len(r.response_ids) for r in skewed(world // engine_tp, e)) for e in range(world // engine_tp)
        ]
        assert found.engine_imbalance == pytest.approx(max(tokens) * len(tokens) / sum(tokens) - 1)
    if (tp, engine_tp, pp) == (1, 1, 1) and world > 1:
        assert first.imbalance < 0.1 < first.imbalance_sampled and 0 < first.moved_share < 0.7


def _same(one: Any, other: Any) -> bool:
    """Equal but for what was received and what was sampled here: text is only with the latter."""
    return [(s.group, s.multiplicity, s.rollout.response_ids) for s in one.sequences] == [
        (s.group, s.multiplicity, s.rollout.response_ids) for s in other.sequences
    ]


def train_skewed(folder: str, tp: int, pp: int, confidence: str) -> dict[str, Any]:
    from rlsc_mcore.data.packing import pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp, pp=pp)
    flags = ["--parallel.tp", str(tp), "--parallel.pp", str(pp), "--algorithm.confidence", confidence]
    trainer = Trainer(
        tiny_config(folder, [*flags, "--optimizer.lr", "1e-3", "--optimizer.eps", "1e-2"]),
        Path(folder),
        backend,
        groups,
    )
    policy = trainer.policy
    found = redistributed(groups, cost=policy.architecture.cost_model())
    batches = pack(found.sequences, 64, multiple_of=groups.tp_size)
    outcomes = [trainer.step(batches, step, NUM_QUESTIONS * NUM_SAMPLES) for step in range(3)]
    weights = export_weights(
        policy.model_weights, policy.architecture, groups.tp_group, groups.tp_size, groups.pp_group
    )
    exported = {name: tensor.clone() for name, tensor in weights}
    return {
        "losses": [outcome.loss for outcome in outcomes],
        "grad_norms": [outcome.grad_norm for outcome in outcomes],
        "exported": exported if groups.rank == 0 else {},
    }


@pytest.mark.parametrize(
    ("world", "tp", "pp", "confidence"),
    [(2, 1, 1, "sequence"), (4, 2, 1, "group_softmax"), (4, 1, 2, "group_softmax")],
    ids=["dp2", "tp2_dp2", "pp2_dp2"],
)
def test_a_step_after_the_exchange_equals_one_rank_s(
    tmp_path: Path, world: int, tp: int, pp: int, confidence: str
) -> None:
    folder = str(make_model_folder(tmp_path / "model", head_dim=64))
    (alone,) = run_ranks(1, train_skewed, folder, 1, 1, confidence)
    ranks = run_ranks(world, train_skewed, folder, tp, pp, confidence)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)
    for name, tensor in alone["exported"].items():
        torch.testing.assert_close(
            ranks[0]["exported"][name],
            tensor,
            rtol=0,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---------------------------------------------------------------- bytes


def weak_scaling(answers_per_rank: int, length: int) -> dict[str, int]:
    """Exchange as many answers per rank whatever the world; returns the bytes that this rank received, by
    kind."""
    import torch.distributed as dist

    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.redistribute import redistribute

    groups = initialize_groups(get_backend(), 1)
    received = {"headers": 0, "tokens": 0}

    def counting(name: str, call: Any) -> Any:
        def counted(output: Any, *arguments: Any, **options: Any) -> Any:
            received[name] += output.nbytes
            return call(output, *arguments, **options)

        return counted

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an object was gathered from all ranks")

    dist.all_gather_into_tensor = counting("headers", dist.all_gather_into_tensor)
    dist.all_to_all_single = counting("tokens", dist.all_to_all_single)
    dist.all_gather_object = refused
    # Every question is one engine's; those of rank 0 are twice as long, so that some of its answers move.
    size = groups.world_size
    mine = [
        Rollout(
            question_index=number * size + groups.rank,
            sample_index=0,
            prompt_ids=(7,) * 5,
            response_ids=tuple(range(1 + number, 1 + number + length * (2 if groups.rank == 0 else 1))),
            engine_log_probs=(-0.5,) * (length * (2 if groups.rank == 0 else 1)),
            finish_reason="stop",
            policy_version=0,
            text="x" * 4 * length,
        )
        for number in range(answers_per_rank)
    ]
    places = {(question, 0): question for question in range(answers_per_rank * size)}
    found = redistribute(
        mine, places, RolloutConfig(num_samples=1), [(7,) * 5] * len(places), MARK, COST, groups
    )
    sampled = {rollout.question_index for rollout in mine}
    foreign = [s.rollout for s in found.sequences if s.rollout.question_index not in sampled]
    return {
        **received,
        "foreign_tokens": sum(len(rollout.response_ids) for rollout in foreign),
        "trained_tokens": sum(len(s.rollout.response_ids) for s in found.sequences),
        "own_tokens": sum(len(rollout.response_ids) for rollout in mine),
    }


def test_bytes_grow_with_what_a_rank_trains_and_not_with_the_world() -> None:
    answers, length = 8, 200
    most = {}
    for world in (2, 4, 8):
        ranks = run_ranks(world, weak_scaling, answers, length)
        for rank in ranks:
            assert rank["tokens"] == 8 * rank["foreign_tokens"]  # four bytes of id, four of log-prob
            assert rank["headers"] == world * (
                8 + 72 * answers
            )  # one count and its headers from every engine
        assert sum(rank["foreign_tokens"] for rank in ranks) > 0
        assert sum(rank["trained_tokens"] for rank in ranks) == sum(rank["own_tokens"] for rank in ranks)
        most[world] = max(rank["tokens"] for rank in ranks)
    assert most[8] <= most[2]


# ---------------------------------------------------------------- rewards and metrics


def rewarded(objective: str) -> dict[tuple[int, int], float] | None:
    from dataclasses import replace

    from rlsc_mcore.config import AlgorithmConfig
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.redistribute import gather_advantages

    groups = initialize_groups(get_backend(), 1)
    questions = [Question(index, "?", str(index % 2)) for index in range(NUM_QUESTIONS)]
    rollouts = [
        replace(rollout, text=f"so \\boxed{{{(rollout.question_index + rollout.sample_index) % 3}}}")
        for rollout in skewed(groups.num_engines, groups.engine_index)
    ]
    return gather_advantages(
        AlgorithmConfig(objective=objective), OPTIONS, rollouts, PLACES, questions, groups
    )


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rewards_are_those_of_whole_questions(num_ranks: int) -> None:
    labels = {(q, s): float((q + s) % 3 == q % 2) for q in range(NUM_QUESTIONS) for s in range(NUM_SAMPLES)}
    for rank in run_ranks(num_ranks, rewarded, "rlvr"):
        assert rank is not None and rank.keys() == labels.keys()
        for (question, sample), value in rank.items():
            mean = sum(labels[question, other] for other in range(NUM_SAMPLES)) / NUM_SAMPLES
            assert value == labels[question, sample] - mean
    # Of four answers numbered modulo 3 the first and the last agree.
    for rank in run_ranks(num_ranks, rewarded, "ttrl"):
        assert rank == {
            (q, s): (0.5 if s in (0, 3) else -0.5) for q in range(NUM_QUESTIONS) for s in range(NUM_SAMPLES)
        }
    assert run_ranks(num_ranks, rewarded, "rlsc") == [None] * num_ranks


def order(extremes: bool) -> Any:
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.metrics_row import _quantiles, order_statistics

    groups = initialize_groups(get_backend(), 1)
    values, counts = spread_values(extremes)
    mine = slice(groups.dp_rank, None, groups.dp_size)
    ranks = list(range(0, int(counts.sum()), 7))
    return order_statistics(values[mine], counts[mine], ranks, groups), _quantiles(
        values[mine], counts[mine].double(), groups
    )


def spread_values(extremes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of all sizes, some equal, with counts from 0 to 3."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(97, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -30, 30, (97,), generator=generator
    )
    if extremes:
        values[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-310, -1e-310])
    values[10:20] = values[20]
    return values, torch.randint(0, 4, (97,), generator=generator)


@pytest.mark.parametrize("extremes", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_order_statistics_of_values_on_several_ranks(num_ranks: int, extremes: bool) -> None:
    values, counts = spread_values(extremes)
    whole = torch.repeat_interleave(values, counts).sort().values
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for selected, quantiles in run_ranks(num_ranks, order, extremes):
        assert selected == whole[::7].tolist()
        assert (quantiles["min"], quantiles["max"]) == (float(whole[0]), float(whole[-1]))
        assert [quantiles["q10"], quantiles["q50"], quantiles["q90"]] == torch.quantile(
            whole, points
        ).tolist()  # bit for bit
