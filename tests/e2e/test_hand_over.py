"""Trainer and engine in one process: who holds the memory, whether they agree, and what ends a run in which
they do not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsc_mcore.commands.status import describe
from rlsc_mcore.config import RunError
from rlsc_mcore.observability.memory_pools import BORDERS, POOLS, STEPS_OF_GROWTH
from rlsc_mcore.run.folder import find_resumable
from rlsc_mcore.training.checkpoint_files import read_state, verify_files
from tests.e2e.runs import FLAGS
from tests.e2e.test_hot_swap import EMBEDDED, make_session
from tests.helpers.ranks import run_ranks


def shift(position: int, token: int) -> float:
    """What a token's log-prob is moved by: mostly little, up or down, sometimes a lot."""
    return (-1) ** token * (0.01 + 0.002 * (token % 7)) + (3.0 if (7 * token + position) % 90 == 0 else 0.0)


def observe(run: str) -> dict[str, Any]:
    """Two honest steps, then one whose engine log-probs were moved by known amounts."""
    session = make_session(Path(run), EMBEDDED, "--observability.tensorboard", "True")
    for number in range(3):
        rollouts = session.sample(number)
        if number == 2:
            rollouts = [
                replace(
                    r,
                    engine_log_probs=tuple(
                        p + shift(i, t)
                        for i, (p, t) in enumerate(zip(r.engine_log_probs, r.response_ids, strict=True))
                    ),
                )
                for r in rollouts
            ]
        result = session.train(number, rollouts)
        session.hot_swap()
        session.record(number, rollouts, result)
    for number in range(3, 3 + STEPS_OF_GROWTH + 1):  # an engine that keeps 4 MiB more after every step
        rollouts_of_leak = session.sample(number)
        result = session.train(number, rollouts_of_leak)
        session.hot_swap()
        session.engine.module.register_buffer("leak", torch.zeros(number << 20), persistent=False)
        session.record(number, rollouts_of_leak, result)
    del session.engine.module.leak
    session.metrics.close()
    parameters = [weight.parameter for weight in session.trainer.policy.weights]
    plan = session.swap._plan
    permuted = {item.engine_name for item in plan.copies}
    own = [p for name, p in session.engine.module.named_parameters() if name in permuted]
    config = session.engine._llm.llm_engine.vllm_config
    blocks, block = config.cache_config.num_gpu_blocks, config.cache_config.block_size
    shape = session.trainer.policy.architecture
    return {
        "rows": session.metrics.rows,
        "answers": {(r.question_index, r.response_ids) for r in rollouts},
        "numel": sum(p.numel() for p in parameters),
        "own": sum(p.numel() * p.element_size() for p in own)
        + sum(b.nbytes for b in session.engine.module.buffers()),
        "kv": blocks * block * shape.kv_bytes_per_token(torch.float32.itemsize, 1),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hand_over") / "run"


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return run_ranks(1, observe, str(folder))[0]


def test_every_border_of_every_step_is_accounted_for(seen: dict[str, Any]) -> None:
    for row in seen["rows"][:3]:
        assert list(row["memory"]) == list(BORDERS)
        for border, pools in row["memory"].items():
            assert list(pools) == list(POOLS)
            # A float32 model: 4 bytes of weight and of gradient per parameter, 8 of moments; buffers are
            # padded.
            assert pools["weights"] == pytest.approx(4 * seen["numel"], rel=0.01)
            assert pools["gradients"] == (
                pools["weights"] if border == "train" else 0
            )  # buffers of one size, only while it trains
            assert pools["optimizer"] == pytest.approx(8 * seen["numel"], rel=0.01)
            assert (
                pools["engine_weights"] == seen["own"] < 0.5 * pools["weights"]
            )  # all else is the trainer's
            assert pools["kv_cache"] == seen["kv"] == 64 << 20
            assert pools["cuda_graphs"] is pools["workspace"] is pools["activations_cached"] is None
            assert 100 << 20 < pools["other"] < 8 << 30 and pools["free"] > 0
        assert not any(text.startswith("memory of") for text in row["warnings"])
    swap = seen["rows"][2]["memory"]["swap"]
    resident = sum(size for pool, size in swap.items() if size is not None and pool != "free")
    assert resident == pytest.approx(seen["rows"][2]["memory_bytes"]["host_resident"], rel=0.02)


def test_a_leak_of_the_engine_is_named(seen: dict[str, Any]) -> None:
    *before, last = seen["rows"]
    assert not any(text.startswith("memory of") for row in before for text in row["warnings"])
    grown = [text for text in last["warnings"] if text.startswith("memory of")]
    assert (
        len(grown) == 1
        and grown[0].startswith("memory of engine_weights grows: ")
        and "after 'sleep'" in grown[0]
    )


def test_memory_is_in_tensorboard_too(seen: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (folder / "tensorboard").iterdir()
    found = {
        (event.step, value.tag): value
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    value = found[2, "memory/release/optimizer"]
    number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
    assert number == pytest.approx(seen["rows"][2]["memory"]["release"]["optimizer"])
    assert (2, "memory/swap/cuda_graphs") not in found and (1, "log_prob_gap_p99") in found


def test_the_gap_is_what_was_put_there(seen: dict[str, Any]) -> None:
    """Against numpy, per token and per answer; identical answers share one pass and count once."""
    moved = [np.array([shift(i, t) for i, t in enumerate(answer)]) for _, answer in seen["answers"]]
    tokens, sums = np.abs(np.concatenate(moved)), np.abs([one.sum() for one in moved])
    row = seen["rows"][2]
    expected = {
        "mean": tokens.mean(),
        "p99": np.quantile(tokens, 0.99, method="inverted_cdf"),
        "max": tokens.max(),
        "sequence_mean": sums.mean(),
        "sequence_max": sums.max(),
    }
    assert tokens.max() > 2.9 > 20 * np.median(tokens)
    for name, value in expected.items():
        assert row[f"log_prob_gap_{name}"] == pytest.approx(value, abs=1e-3), name
    (warning,) = [text for text in row["warnings"] if text.startswith("trainer and engine disagree")]
    assert f"{row['log_prob_gap_mean']:.2e} on average (expected below 3e-05)" in warning


def test_honest_steps_agree(seen: dict[str, Any]) -> None:
    for row in seen["rows"][:2]:
        assert row["log_prob_gap_mean"] <= row["log_prob_gap_p99"] <= row["log_prob_gap_max"] < 1e-4
        assert row["log_prob_gap_sequence_mean"] <= row["log_prob_gap_sequence_max"] < 1e-3
        assert not any(text.startswith("trainer and engine") for text in row["warnings"])


def train_on_a_broken_engine(flags: list[str], broken_from: int) -> tuple[str, list[str]]:
    """Run `rlsc train`; the engine's own tensors are scrambled after the swap of step `broken_from`, and at
    every later one."""
    import contextlib
    import io

    from rlsc_mcore.commands import train as commands
    from rlsc_mcore.training.session import Session

    hot_swap = Session.hot_swap

    def break_engine(self: Any) -> None:
        hot_swap(self)
        if self.swap.policy_version > broken_from:
            for item in self.swap._plan.copies:
                tensor = self.engine.module.get_parameter(item.engine_name).data
                tensor.copy_(tensor.roll(1, 0))

    Session.hot_swap = break_engine  # type: ignore[method-assign]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            commands.run_train(flags)
            message = ""
        except RunError as error:
            message = str(error)
    return message, printed.getvalue().splitlines()


def test_a_run_with_a_broken_engine_ends_with_its_last_good_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--run-dir", str(run_dir), *FLAGS, "--training.num-steps", "9", "--training.async-save", "True"]
    ((message, lines),) = run_ranks(1, train_on_a_broken_engine, flags, 1)
    assert message.startswith("trainer and engine disagreed on the sampled tokens in 3 steps in a row, by ")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["log_prob_gap_mean"] > 1e-3 for row in rows] == [False, False, True, True, True]
    assert sum(line.startswith("warning: trainer and engine disagree on") for line in lines) == 1
    assert sum("is not saved: its answers were sampled by other weights" in line for line in lines) == 2
    checkpoint = find_resumable(run_dir)
    verify_files(checkpoint)
    assert read_state(checkpoint).steps_done == 2 and not list((run_dir / "checkpoints").glob("*.partial"))
    facts = describe(run_dir, now=0.0)
    assert (
        facts["state"].startswith("crash: trainer and engine disagreed")
        and "differs from the trainer by" in facts["engine"]
    )
    assert "trainer and engine disagree on" in facts["warnings"]


def test_where_mismatch_only_warns_the_run_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    only_warn = ["--observability.max-mismatched-steps", "0", "--training.num-steps", "5"]
    ((message, lines),) = run_ranks(
        1, train_on_a_broken_engine, ["--run-dir", str(run_dir), *FLAGS, *only_warn], 0
    )
    assert (
        "SwapMismatch" in message or "in the engine" in message
    )  # the export at the end finds the broken engine
    assert read_state(find_resumable(run_dir)).steps_done == 5 and not any(
        "is not saved" in line for line in lines
    )
