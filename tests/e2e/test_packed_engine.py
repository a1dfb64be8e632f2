"""An engine on a CPU that multiplies with packed copies of the shared weights, and what a run keeps of its
choice."""

import json
from pathlib import Path
from typing import Any

from tests.e2e.test_hot_swap import EMBEDDED, answers, make_session, message
from tests.helpers.ranks import run_ranks


def trained_answers(run: str, products: str) -> dict[str, Any]:
    """Two steps and swaps, then greedy answers; with packed weights also an update without a swap."""
    session = make_session(Path(run), EMBEDDED, "--rollout.cpu-products", products)
    packed = session.engine._packed
    seen: dict[str, Any] = {}
    for number in range(2):
        rollouts = session.sample(number)
        seen["packed_bytes"] = packed.nbytes()
        seen["counted_bytes"] = sum(session.engine.memory({}.keys())["engine_weights"].values())
        session.train(number, rollouts)
        seen["bytes_in_training"] = packed.nbytes()
        session.hot_swap()
    seen["answers"] = answers(session)
    seen["parameters"] = sum(parameter.numel() for parameter in session.engine.module.parameters())
    if products == "packed":
        first = session.trainer.policy.model_weights[0]
        first.parameter.data.add_(1e-3)
        seen["stale"] = message(answers, session)
        session.hot_swap()
        seen["after_swap"] = message(answers, session)
    session.close()
    return seen


def test_a_packed_engine_samples_the_trained_weights(tmp_path: Path) -> None:
    plain, packed = (
        run_ranks(1, trained_answers, str(tmp_path / products), products)[0]
        for products in ("blas", "packed")
    )
    assert plain["packed_bytes"] == 0
    assert packed["packed_bytes"] > 0 and packed["counted_bytes"] >= packed["packed_bytes"]
    assert packed["bytes_in_training"] == 0  # the trainer has the memory back
    assert packed["parameters"] == plain["parameters"]  # nothing was emptied
    for ours, theirs in zip(packed["answers"], plain["answers"], strict=True):
        (tokens, log_probs), (expected_tokens, expected) = ours[0], theirs[0]
        assert tokens == expected_tokens
        assert max(abs(a - b) for a, b in zip(log_probs, expected, strict=True)) < 1e-3
    assert "changed after it was packed" in packed["stale"]
    assert packed["after_swap"] == ""


def tuned(run: str) -> list[Any]:
    """The choice of a new run, and that of the same run resumed after its file was changed."""
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.cpu_products import products_in_use
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.cpu_tuning import tune_cpu
    from rlsc_mcore.training.inputs import read_inputs

    config = parse_config(
        [
            "--run-dir",
            run,
            "--model.path",
            EMBEDDED,
            "--model.dtype",
            "float32",
            "--data.path",
            "embedded:train",
        ]
    )
    groups = initialize_groups(get_backend(), 1)
    architecture = read_inputs(config, get_backend(), None).architecture
    Path(run).mkdir()
    first = tune_cpu(config, architecture, groups, resuming=False)
    file = Path(run) / "cpu.json"
    kept = json.loads(file.read_text())
    kept["products"] = {"trainer": "onednn", "engine": "packed"}
    file.write_text(json.dumps(kept))
    second = tune_cpu(config, architecture, groups, resuming=True)
    in_use = products_in_use()
    kept["processor"] = "another processor"
    file.write_text(json.dumps(kept))
    third = tune_cpu(config, architecture, groups, resuming=True)
    return [first, second, in_use, third]


def test_a_resumed_run_keeps_its_products(tmp_path: Path) -> None:
    first, second, in_use, third = run_ranks(1, tuned, str(tmp_path / "run"))[0]
    assert set(first.trainer_us) == {"blas", "onednn"} and first.threads == 1
    assert second.products == in_use and (in_use.trainer, in_use.engine) == ("onednn", "packed")
    assert third.processor == first.processor and third.trainer_us  # measured again on another processor
