"""The hand-over of memory on a GPU: sleep frees the cache, the release frees activations and optimizer, and
all of it is accounted for.

In processes of its own: an engine, and the allocator's statistics, are one per process.
"""

from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.observability.memory_pools import BORDERS
from tests.helpers.folders import make_runnable_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_config

NUM_STEPS = 5
CACHE_GIB = 1


def run_steps(model: str, run: str, flags: list[str]) -> dict[str, Any]:
    import torch

    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest

    options = [
        "--model.dtype",
        "bfloat16",
        "--data.questions-per-step",
        "8",
        "--rollout.max-new-tokens",
        "64",
        "--optimizer.lr",
        "1e-4",
    ]
    options += ["--rollout.kv-cache-gib", str(CACHE_GIB), "--training.num-steps", str(NUM_STEPS), *flags]
    session = Session(tiny_config(model, options, run), StopRequest())
    for step in range(NUM_STEPS):
        rollouts = session.sample(step)
        result = session.train(step, rollouts)
        session.hot_swap()
        session.record(step, rollouts, result)
    return {
        "rows": session.metrics.rows,
        "total": torch.cuda.mem_get_info()[1],
        "numel": sum(weight.parameter.numel() for weight in session.trainer.policy.weights),
        "weights": {
            weight.name: weight.parameter.detach().cpu() for weight in session.trainer.policy.weights
        },
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runnable_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=512, head_dim=64)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_sleep_level_frees_what_it_says(model: Path, tmp_path: Path, level: int) -> None:
    (seen,) = run_ranks(
        1, run_steps, str(model), str(tmp_path / "run"), ["--rollout.sleep-level", str(level)]
    )
    for row in seen["rows"][1:]:
        table = row["memory"]
        assert list(table) == list(BORDERS)
        for pools in table.values():
            assert sum(pools.values()) == pytest.approx(seen["total"], rel=0.001)
        cache = {border: pools["kv_cache"] >> 20 for border, pools in table.items()}
        awake = pytest.approx(CACHE_GIB << 10, rel=0.05)
        assert cache["rollout"] == awake and cache["swap"] == awake
        assert all(cache[border] == (0 if level else awake) for border in ("sleep", "train", "release"))
        assert (table["sleep"]["engine_weights"] == 0) == (level > 0) and table["swap"]["engine_weights"] > 0
        assert table["release"]["activations_cached"] <= table["train"]["activations_cached"]
        assert row["log_prob_gap_mean"] < 0.1 and not any(
            text.startswith("memory of") for text in row["warnings"]
        )


def test_the_optimizer_leaves_its_place_and_comes_back(model: Path, tmp_path: Path) -> None:
    (kept,) = run_ranks(1, run_steps, str(model), str(tmp_path / "kept"), [])
    (moved,) = run_ranks(
        1, run_steps, str(model), str(tmp_path / "moved"), ["--optimizer.offload-during-rollout", "True"]
    )
    for row in moved["rows"]:
        held = {border: pools["optimizer"] for border, pools in row["memory"].items()}
        assert held["train"] == pytest.approx(12 * moved["numel"], rel=0.05)
        assert [held[border] for border in ("rollout", "sleep", "release", "swap")] == [0] * 4
    assert all((row["memory"]["release"]["optimizer"] or 0) > 0 for row in kept["rows"])
    assert kept["weights"].keys() == moved["weights"].keys()
    assert kept["rows"][0]["loss"] == pytest.approx(moved["rows"][0]["loss"], rel=1e-2)
