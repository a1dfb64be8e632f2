"""A run with LoRA: the engine samples from the merged weights, a stale merge is caught, a resumed run is the
same, and the adapter is exported."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.runs import EMBEDDED, FLAGS, assert_same_run, metrics, run_command, train
from tests.e2e.test_hot_swap import make_session, message, step
from tests.helpers.ranks import run_ranks

LORA = ["--lora.rank", "4"]


def observe(run_dir: str) -> dict[str, Any]:
    """Two steps, a step whose merge is left out, and a single layer with other values."""
    session = make_session(Path(run_dir), EMBEDDED, *LORA)
    outcomes = [step(session, number) for number in range(2)]
    adapters = session.trainer.policy.adapters
    seen: dict[str, Any] = {"gaps": [outcome.scores.gap_max for outcome in outcomes]}
    merge, adapters.merge = adapters.merge, lambda: None
    seen["not merged"] = message(step, session, 2)
    adapters.merge = merge
    merge()
    seen["merged again"] = message(session.hot_swap)
    linear = adapters.linears[-1]
    linear.weight.data[0, 0] += 1
    swaps = range(len(adapters.linears))
    seen["one element"] = [message(session.hot_swap) for _ in swaps]
    return seen


def test_the_engine_holds_the_merged_weights(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, observe, str(tmp_path / "run"))
    assert max(seen["gaps"]) < 1e-4
    stale = "the shared weight is not W0 + (alpha / r) B A of the adapter"
    assert seen["not merged"].startswith("SwapMismatch: hot swap: model.layers.")
    assert seen["not merged"].endswith(stale) and seen["merged again"] == ""
    assert [text for text in seen["one element"] if text] == [
        f"SwapMismatch: hot swap: model.layers.3.mlp.down_proj: {stale}"
    ]


def flags(run_dir: Path, *more: str) -> list[str]:
    return ["--run-dir", str(run_dir), *FLAGS, *LORA, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ((code, lines),) = run_ranks(1, train, [flags(run_dir)])[0]
    assert code == 0 and any(line.startswith("LoRA: rank 4, alpha 32, ") for line in lines)
    return run_dir


def test_a_resumed_run_is_the_same(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = flags(run_dir, "--training.num-steps", "2")
    results = run_ranks(1, train, [short, ["--resume", str(run_dir), "--training.num-steps", "4"]])[0]
    assert [code for code, _ in results] == [0, 0]
    assert_same_run(run_dir, whole)
    assert all(row["log_prob_gap_max"] < 1e-4 for row in metrics(whole))


def test_the_command_exports_the_adapter(whole: Path, tmp_path: Path) -> None:
    assert run_command("export", whole, "--adapter").returncode == 0
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 4  # two factors of seven projections of four layers
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape[0] == 4
    done = run_command("export", whole, "--output", tmp_path / "merged")
    merged, at_the_end = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", whole / "export")
    )
    assert done.returncode == 0 and all((merged[name] == tensor).all() for name, tensor in at_the_end.items())


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = ["--run-dir", str(run_dir), *FLAGS, "--training.num-steps", "1"]
    assert run_ranks(1, train, [short])[0][0][0] == 0
    done = run_command("export", run_dir, "--adapter")
    assert done.returncode == 2 and "lora.rank is 0" in done.stderr and done.stderr.count("\n") == 1
