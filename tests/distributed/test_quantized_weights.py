"""TransformerEngine's cached fp8 weights: made anew after every update, freed with the training's memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_overlap import make_batches, make_trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder


def train(folder: str, flags: list[str], tells: bool) -> dict[str, Any]:
    """Train with linear layers that keep a copy of their weight by TransformerEngine's rule, and compare it
    at every pass."""
    trainer = make_trainer(folder, 1, flags)
    model = trainer.policy.model
    model.config.fp8 = (
        "hybrid"  # what `set_is_first_microbatch` asks; nothing else reads it without TransformerEngine
    )
    stale, copies = [], []

    def use_cached(module: Any, _: Any) -> None:
        if module.is_first_microbatch or not module._fp8_workspaces:
            module._fp8_workspaces["weight"] = module.weight.detach().clone()
            copies.append(1)
        module.is_first_microbatch = False
        stale.append(not torch.equal(module._fp8_workspaces["weight"], module.weight))

    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.is_first_microbatch, layer.mlp.linear_fc1._fp8_workspaces = True, {}
        layer.mlp.linear_fc1.register_forward_pre_hook(use_cached)
    if not tells:
        trainer.ddp.set_is_first_microbatch = model.set_is_first_microbatch = lambda: None
    for step in range(3):
        batches, count = make_batches(trainer, step, lonely=False)
        assert len(batches) > 1
        trainer.step(batches, step, count)
    passes = len(stale)
    trainer.release_memory()
    return {
        "stale": sum(stale),
        "passes": passes,
        "copies": len(copies),
        "kept": sum(len(layer.mlp.linear_fc1._fp8_workspaces) for layer in model.decoder.layers),
        "layers": len(model.decoder.layers),
    }


@pytest.mark.parametrize(
    "flags", [[], ["--algorithm.confidence", "group_softmax"]], ids=["one pass", "scored first"]
)
def test_no_pass_uses_the_weights_of_an_earlier_step(tmp_path: Path, flags: list[str]) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    options = [*flags, "--training.updates-per-rollout", "2"]
    (run,) = run_ranks(1, train, folder, options, True)
    assert run["stale"] == 0 and run["kept"] == 0
    scored = 3 if flags else 0
    assert (
        run["copies"] == (3 * 2 + scored) * run["layers"] < run["passes"]
    )  # one per update and layer, not per micro-batch
    (untold,) = run_ranks(1, train, folder, options, False)
    assert untold["stale"] > 0
