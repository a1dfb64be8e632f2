"""The loop on a GPU, in bfloat16: TransformerEngine where it imports, CUDA graphs, sleep level 2, aliased
weights.

`bash launch/test.sh tests/gpu` runs it; without a GPU it skips.
"""

import json
from pathlib import Path

import pytest
import torch

from rlsc_mcore.parallel.backend import get_backend
from rlsc_mcore.training.session import Session
from rlsc_mcore.training.signals import StopRequest
from tests.helpers.folders import make_runnable_folder
from tests.helpers.tiny import tiny_config

NUM_STEPS = 3
GAP_LIMIT = 0.05  # mean |trainer - engine| log-prob per token in bfloat16


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on a random model with the embedded model's tokenizer."""
    folder = make_runnable_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=512, head_dim=64)
    flags = [
        "--model.dtype",
        "bfloat16",
        "--data.questions-per-step",
        "8",
        "--rollout.max-new-tokens",
        "64",
        "--rollout.kv-cache-gib",
        "1",
    ]
    flags += ["--optimizer.lr", "1e-3", "--training.num-steps", str(NUM_STEPS)]
    return Session(tiny_config(folder, flags, tmp_path_factory.mktemp("run")), StopRequest())


def test_steps_agree_with_the_engine_across_sleep(session: Session, tmp_path: Path) -> None:
    """Every step's rollouts come from the new weights: the trainer scores them as the engine did, after sleep
    level 2 too."""
    assert get_backend().is_cuda
    assert session.swap.num_aliased() > session.swap.num_copied() > 0
    for step in range(NUM_STEPS):
        rollouts = session.sample(step)
        assert {rollout.policy_version for rollout in rollouts} == {step}
        result = session.train(step, rollouts)
        session.hot_swap()
        session.record(step, rollouts, result)
        assert result.outcome.updated
    rows = [json.loads(line) for line in (session.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["log_prob_gap_mean"] < GAP_LIMIT for row in rows), [
        row["log_prob_gap_mean"] for row in rows
    ]
    assert session.export(tmp_path / "export") == len(session.trainer.policy.weights)


def test_a_step_does_not_keep_memory(session: Session) -> None:
    """What the trainer holds between steps does not grow."""
    held = []
    for step in range(NUM_STEPS, NUM_STEPS + 3):
        rollouts = session.sample(step)
        session.train(step, rollouts)
        session.hot_swap()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] * 1.01
