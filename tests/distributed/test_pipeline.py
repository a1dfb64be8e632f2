"""Pipeline stages equal one rank: losses, gradients' norms, weights, scores, whatever the layout and the
objective."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

pytestmark = pytest.mark.distributed


class Ticks:
    """Progress that counts."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self, amount: int) -> None:
        self.count += amount


def train_stages(
    folder: str, tp: int, pp: int, budget: int, num_questions: int, *flags: str
) -> dict[str, Any]:
    """Take three optimizer steps on fixed rollouts; returns what a rank saw."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.model.weight_map import export_weights
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, tp, pp=pp)
    # A large epsilon keeps AdamW smooth: with the usual one its first step is the sign of the gradient,
    # rounding noise included.
    layout = [
        "--parallel.tp",
        str(tp),
        "--parallel.pp",
        str(pp),
        "--optimizer.lr",
        "1e-3",
        "--optimizer.eps",
        "1e-2",
    ]
    trainer = Trainer(tiny_config(folder, [*layout, *flags]), Path(folder), backend, groups)
    policy = trainer.policy
    rollouts = make_rollouts(
        num_questions=num_questions, num_samples=3, vocab_size=policy.architecture.vocab_size
    )
    values = [float(rollout.question_index % 3) - 1.0 for rollout in rollouts]
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0}), advantages=values
    )
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], budget, multiple_of=trainer.token_multiple)
    ticks = Ticks()
    outcomes = [trainer.step(batches, step, len(rollouts), ticks) for step in range(3)]
    weights = export_weights(
        policy.model_weights, policy.architecture, groups.tp_group, groups.tp_size, groups.pp_group
    )
    exported = {name: tensor.clone() for name, tensor in weights}
    return {
        "losses": [update.loss for outcome in outcomes for update in outcome.updates],
        "grad_norms": [update.grad_norm for outcome in outcomes for update in outcome.updates],
        "exported": exported if groups.rank in (0, groups.world_size - 1) else None,
        "scores": [outcome.scores for outcome in outcomes],
        "num_tokens": [outcome.num_tokens for outcome in outcomes],
        "layers": [
            int(weight.engine.split(".")[2])
            for weight in policy.weights
            if weight.engine.endswith("o_proj.weight")
        ],
        "num_batches": len(batches),
        "ticks": ticks.count,
        "stage": groups.pp_rank,
        "dp_rank": groups.dp_rank,
    }


def assert_equal_to_one_rank(
    folder: str, world: int, tp: int, pp: int, *flags: str, budget: int = 64, questions: int = 4
) -> list[Any]:
    (alone,) = run_ranks(1, train_stages, folder, 1, 1, budget, questions, *flags)
    ranks = run_ranks(world, train_stages, folder, tp, pp, budget, questions, *flags)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-6, abs=1e-7)
        assert rank["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-5)
        assert rank["losses"] == ranks[0]["losses"] and rank["grad_norms"] == ranks[0]["grad_norms"]
        # Every stage has the scores of the last one.
        for mine, theirs in zip(
            rank["scores"], next(r for r in ranks if r["dp_rank"] == rank["dp_rank"])["scores"], strict=True
        ):
            assert all(torch.equal(getattr(mine, name), value) for name, value in vars(theirs).items())
        assert rank["ticks"] == rank["num_batches"] * len(rank["losses"])
    for name, tensor in alone["exported"].items():
        for rank in (ranks[0], ranks[-1]):
            torch.testing.assert_close(
                rank["exported"][name], tensor, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
    for step, scores in enumerate(alone["scores"]):
        first = {rank["dp_rank"]: rank["scores"][step] for rank in ranks}
        for name in ("log_probs", "weights", "gap_sums"):
            together = torch.cat([getattr(part, name) for part in first.values()]).sort().values
            torch.testing.assert_close(together, getattr(scores, name).sort().values, rtol=1e-4, atol=1e-4)
    return ranks


CASES = [
    pytest.param(2, 1, 2, True, (), id="pp2-tied"),
    pytest.param(2, 1, 2, False, ("--training.updates-per-rollout", "2"), id="pp2-updates"),
    pytest.param(2, 1, 2, True, ("--algorithm.confidence", "group_softmax"), id="pp2-group-softmax"),
    pytest.param(2, 1, 2, False, ("--algorithm.objective", "entropy"), id="pp2-entropy"),
    pytest.param(2, 1, 2, False, ("--algorithm.objective", "majority_vote"), id="pp2-reward"),
    pytest.param(
        2,
        1,
        2,
        True,
        ("--training.recompute", "full", "--optimizer.distributed", "False"),
        id="pp2-recompute",
    ),
    pytest.param(4, 2, 2, True, ("--training.updates-per-rollout", "2"), id="tp2-pp2"),
    pytest.param(4, 1, 2, True, ("--algorithm.confidence", "group_softmax"), id="pp2-dp2-tied"),
    pytest.param(4, 1, 2, False, ("--parallel.overlap-grad-reduce", "True"), id="pp2-dp2-overlap"),
]


@pytest.mark.parametrize(("world", "tp", "pp", "tied", "flags"), CASES)
def test_stages_equal_one_rank(
    tmp_path: Path, world: int, tp: int, pp: int, tied: bool, flags: tuple[str, ...]
) -> None:
    folder = str(make_model_folder(tmp_path / "model", tied=tied))
    ranks = assert_equal_to_one_rank(folder, world, tp, pp, *flags)
    assert ranks[0]["layers"] == [0] and ranks[-1]["layers"] == [1]


@pytest.mark.parametrize(
    ("budget", "questions"), [(4096, 2), (8, 2)], ids=["one-micro-batch", "one-per-sequence"]
)
def test_any_number_of_micro_batches(tmp_path: Path, budget: int, questions: int) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    ranks = assert_equal_to_one_rank(folder, 2, 1, 2, budget=budget, questions=questions)
    assert ranks[0]["num_batches"] == (1 if budget > 100 else 5)


def test_stages_of_unequal_size(tmp_path: Path) -> None:
    """Four layers as three and one, and as the default splits them, whose last stage has the head as well."""
    folder = str(make_model_folder(tmp_path / "model", num_layers=4))
    (alone,) = run_ranks(1, train_stages, folder, 1, 1, 64, 2)
    for flags, layers in ((("--parallel.stage-layers", "3", "1"), [[0, 1, 2], [3]]), ((), [[0, 1, 2], [3]])):
        ranks = run_ranks(2, train_stages, folder, 1, 2, 64, 2, *flags)
        assert [rank["layers"] for rank in ranks] == layers
        assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        for name, tensor in alone["exported"].items():
            torch.testing.assert_close(
                ranks[1]["exported"][name], tensor, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def train_poisoned(folder: str, stage: int) -> dict[str, Any]:
    """Take a step on weights of which one stage has a NaN, and one without micro-batches; returns what became
    of them."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    backend = get_backend()
    groups = initialize_groups(backend, 1, pp=2)
    trainer = Trainer(
        tiny_config(folder, ["--parallel.pp", "2", "--training.updates-per-rollout", "2"]),
        Path(folder),
        backend,
        groups,
    )
    rollouts = make_rollouts(num_questions=2, num_samples=3)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    empty = trainer.step([], 0, len(rollouts))
    if groups.pp_rank == stage:
        norm = next(
            weight.parameter for weight in trainer.policy.weights if "input_layernorm" in weight.engine
        )
        norm.data[3] = float("nan")
    before = [weight.parameter.detach().clone() for weight in trainer.policy.weights]
    outcome = trainer.step(pack(sequences, 64), 1, len(rollouts))
    after = [weight.parameter for weight in trainer.policy.weights]
    kept = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    return {
        "empty": (empty.loss, empty.grad_norm, empty.updated, empty.num_tokens, len(empty.scores.log_probs)),
        "updates": [(update.updated, update.loss != update.loss) for update in outcome.updates],
        "kept": kept,
    }


@pytest.mark.parametrize("stage", [0, 1])
def test_all_stages_skip_what_is_not_finite_on_one(tmp_path: Path, stage: int) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    for rank in run_ranks(2, train_poisoned, folder, stage):
        assert rank["empty"] == (
            0.0,
            0.0,
            True,
            0,
            0,
        )  # no micro-batches: no gradient, no schedule to wait in
        assert rank["updates"] == [(False, True)] and rank["kept"]
