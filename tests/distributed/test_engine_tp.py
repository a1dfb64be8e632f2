"""The whole loop on several ranks: engines of the trainer's tensor-parallel size, of a smaller and of a
larger one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.folders import make_runnable_folder
from tests.helpers.ranks import run_ranks

FLAGS = [
    "--model.dtype", "float32", "--data.path", "embedded:train", "--data.questions-per-step", "4", "--rollout.num-samples", "4",
    "--rollout.max-new-tokens", "24", "--rollout.max-num-seqs", "32", "--optimizer.lr", "1e-3", "--optimizer.eps", "1e-3",
    "--training.num-steps", "3", "--training.tokens-per-micro-batch", "512", "--observability.tensorboard", "False",
]  # fmt: skip


def greedy(session: Any) -> list[Any]:
    """Tokens and log-probabilities."""
    from rlsc_mcore.rollout.engine import SamplingRequest

    requests = [SamplingRequest(prompt, 1, 0.0, 24, 0) for prompt in session.inputs.prompts[:8]]
    return [(group[0].token_ids, group[0].log_probs) for group in session.engine.generate(requests)]


def tokens(answers: list[Any]) -> list[tuple[int, ...]]:
    return [token_ids for token_ids, _ in answers]


def train_and_export(folder: str, run_dir: str, tp: int, *flags: str) -> dict[str, Any]:
    """Three steps of the loop; rows of the metrics, greedy answers before and after, and the swap checked
    against the export."""
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    config = parse_config(
        ["--run-dir", run_dir, "--model.path", folder, "--parallel.tp", str(tp), *FLAGS, *flags]
    )
    session = Session(config, StopRequest())
    before = greedy(session)
    rollouts = []
    for step in range(config.training.num_steps):
        sampled = session.sample(step)
        assert {rollout.policy_version for rollout in sampled} == {step}
        rollouts.append(
            [(rollout.question_index, rollout.sample_index, rollout.response_ids) for rollout in sampled]
        )
        result = session.train(step, sampled)
        session.hot_swap()
        session.record(step, sampled, result)
    compared = session.export(Path(run_dir) / "export")
    return {
        "rows": session.metrics.rows,
        "before": before,
        "after": greedy(session),
        "rollouts": rollouts,
        "compared": compared,
        "parameters": len(list(session.engine.module.named_parameters())),
        "aliased": session.swap.num_aliased(),
        "copied": session.swap.num_copied(),
    }


def greedy_answers(folder: str, run_dir: str, tp: int = 1, *flags: str) -> list[Any]:
    """What a fresh engine answers."""
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    config = parse_config(
        ["--run-dir", run_dir, "--model.path", folder, "--parallel.tp", str(tp), *FLAGS, *flags]
    )
    return greedy(Session(config, StopRequest()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_runnable_folder(tmp_path_factory.mktemp("engine_tp") / "model", tied=False))


def test_tp2_engine_and_trainer_share_weights_and_agree(folder: str, tmp_path: Path) -> None:
    ranks = run_ranks(2, train_and_export, folder, str(tmp_path / "tp2"), 2)
    for rank in ranks:
        # compare_with_export laid every parameter out by vLLM's own rule: it raises on the first difference.
        assert rank["compared"] == rank["parameters"] == rank["aliased"] + rank["copied"]
        assert rank["rows"] and all(row["log_prob_gap_max"] < 1e-4 for row in rank["rows"])
        assert rank["rollouts"] == ranks[0]["rollouts"]  # the ranks of a group sample the same answers
        assert rank["after"] == ranks[0]["after"]
    assert tokens(ranks[0]["before"]) == tokens(
        run_ranks(1, greedy_answers, folder, str(tmp_path / "tp1"))[0]
    )
    fresh = run_ranks(2, greedy_answers, str(tmp_path / "tp2" / "export"), str(tmp_path / "fresh"), 2)
    assert ranks[0]["after"] == fresh[0]  # bit for bit
    assert tokens(ranks[0]["after"]) != tokens(ranks[0]["before"])


LAYOUTS = [
    pytest.param(2, 2, 1, "qwen2", True, id="2-ranks-2-to-1-qwen2"),
    pytest.param(2, 1, 2, "llama", False, id="2-ranks-1-to-2-llama", marks=pytest.mark.slow),
    pytest.param(4, 4, 2, "qwen3", False, id="4-ranks-4-to-2-qwen3", marks=pytest.mark.slow),
    pytest.param(4, 2, 4, "qwen2", False, id="4-ranks-2-to-4-qwen2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "tp", "engine_tp", "architecture", "tied"), LAYOUTS)
def test_engines_of_another_size(
    world: int, tp: int, engine_tp: int, architecture: str, tied: bool, tmp_path: Path
) -> None:
    """After three optimizer steps the engines hold the export, and answer bit for bit like fresh engines on
    it."""
    # 520 is no multiple of 64: both sides pad the vocabulary.
    model = str(
        make_runnable_folder(
            tmp_path / "model", architecture=architecture, tied=tied, num_kv_heads=4, vocab_size=520
        )
    )
    engine = ("--rollout.tp", str(engine_tp))
    ranks = run_ranks(world, train_and_export, model, str(tmp_path / "run"), tp, *engine)
    for rank in ranks:
        # compare_with_export laid every parameter out by vLLM's own rule: it raises on the first difference.
        assert rank["compared"] == rank["parameters"] == rank["aliased"] + rank["copied"]
        assert rank["after"] == ranks[0]["after"]
        assert all(row["log_prob_gap_max"] < 1e-4 for row in rank["rows"])
    for step in range(3):  # every answer was sampled once, by one engine
        engines = [ranks[first]["rollouts"][step] for first in range(0, world, engine_tp)]
        assert all(ranks[number]["rollouts"][step] == engines[number // engine_tp] for number in range(world))
        sampled = [rollout[:2] for engine in engines for rollout in engine]
        assert len(sampled) == len(set(sampled)) == 16
        assert all(engines)
    export = str(tmp_path / "run" / "export")
    fresh = run_ranks(engine_tp, greedy_answers, export, str(tmp_path / "fresh"), engine_tp)
    assert ranks[0]["after"] == fresh[0]
    assert tokens(ranks[0]["after"]) != tokens(ranks[0]["before"])


STAGES = [
    pytest.param(2, 1, 1, True, id="pp2-tied", marks=pytest.mark.slow),
    pytest.param(2, 1, 2, False, id="pp2-engine-of-both-stages"),
    pytest.param(4, 2, 1, False, id="tp2-pp2-engine-1", marks=pytest.mark.slow),
    pytest.param(4, 1, 1, True, id="pp2-dp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "tp", "engine_tp", "tied"), STAGES)
def test_engines_of_a_trainer_in_stages(
    world: int, tp: int, engine_tp: int, tied: bool, tmp_path: Path
) -> None:
    """The whole loop with pipeline stages: engines hold all layers, their own stage's as the trainer's
    bytes."""
    model = str(make_runnable_folder(tmp_path / "model", tied=tied, num_kv_heads=4, vocab_size=520))
    flags = (
        "--parallel.pp",
        "2",
        "--rollout.tp",
        str(engine_tp),
        "--rollout.verify-swap",
        "full",
        "--training.updates-per-rollout",
        "2",
    )
    ranks = run_ranks(world, train_and_export, model, str(tmp_path / "run"), tp, *flags)
    for rank in ranks:
        assert rank["compared"] == rank["parameters"] == rank["aliased"] + rank["copied"]
        assert rank["after"] == ranks[0]["after"]
        assert len(rank["rows"]) == 3
        assert all(row["log_prob_gap_max"] < 1e-4 and not row["skipped"] for row in rank["rows"])
    if engine_tp == tp:  # what is not interleaved of a stage's one layer, norms and embedding is shared
        assert all(rank["aliased"] >= 5 for rank in ranks)
    fresh = run_ranks(
        engine_tp, greedy_answers, str(tmp_path / "run" / "export"), str(tmp_path / "fresh"), engine_tp
    )
    assert ranks[0]["after"] == fresh[0]
    assert tokens(ranks[0]["after"]) != tokens(ranks[0]["before"])


def test_bfloat16_engine_of_a_float32_trainer(folder: str, tmp_path: Path) -> None:
    flags = ("--rollout.dtype", "bfloat16", "--observability.max-log-prob-gap", "0.2")
    (rank,) = run_ranks(1, train_and_export, folder, str(tmp_path / "run"), 1, *flags)
    assert rank["aliased"] == 0
    assert rank["compared"] == rank["copied"] == rank["parameters"]
    assert 1e-4 < rank["rows"][-1]["log_prob_gap_mean"] < 0.1  # bfloat16's rounding, and no more


def refused(folder: str, run_dir: str, *flags: str) -> str:
    from rlsc_mcore.config import ConfigError

    try:
        greedy_answers(folder, run_dir, 2, *flags)
    except ConfigError as error:
        return str(error)
    return ""


def test_sizes_that_do_not_fit_are_refused_with_the_legal_ones(folder: str, tmp_path: Path) -> None:
    for rank in run_ranks(2, refused, folder, str(tmp_path / "run"), "--rollout.tp", "4"):
        assert rank == f"rollout.tp: 4 does not divide num_key_value_heads = 2 of {folder}"
    for rank in run_ranks(2, refused, folder, str(tmp_path / "run"), "--rollout.tp", "3"):
        assert rank == "rollout.tp: expected a divisor or a multiple of parallel.tp = 2 (1, 2, 4, ...), got 3"
    wide = str(make_runnable_folder(tmp_path / "wide", num_kv_heads=4))
    for rank in run_ranks(2, refused, wide, str(tmp_path / "run"), "--rollout.tp", "4"):
        assert rank == "rollout.tp: 4 does not divide the 2 processes that were started"
    assert not (tmp_path / "run").exists()


def test_dp2_is_the_run_of_one_rank(folder: str, tmp_path: Path) -> None:
    ranks = run_ranks(2, train_and_export, folder, str(tmp_path / "dp2"), 1)
    (alone,) = run_ranks(1, train_and_export, folder, str(tmp_path / "alone"), 1)
    first = sorted(rollout for rank in ranks for rollout in rank["rollouts"][0])
    assert first == sorted(alone["rollouts"][0])  # a question's answers do not depend on who samples them
    assert {r[:2] for r in ranks[0]["rollouts"][0]}.isdisjoint({r[:2] for r in ranks[1]["rollouts"][0]})
    written = [
        json.loads(line)
        for line in (tmp_path / "dp2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row, single in zip(written, alone["rows"], strict=True):
        assert row["num_samples"] == single["num_samples"] == 16
        assert row["log_prob_gap_max"] < 1e-4
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    for name in (
        "loss",
        "f_estimate",
        "grad_norm",
        "mean_length",
        "distinct_share",
        "truncated_share",
        "alpha_share",
        "effective_samples",
        "reasoning_entropy",
    ):
        assert written[0][name] == pytest.approx(alone["rows"][0][name], rel=1e-5), name
    assert all(rank["compared"] == rank["parameters"] for rank in ranks)
    assert sorted(path.name for path in (tmp_path / "dp2" / "rollouts").iterdir())[:2] == [
        "step_000000.rank0.jsonl",
        "step_000000.rank1.jsonl",
    ]
