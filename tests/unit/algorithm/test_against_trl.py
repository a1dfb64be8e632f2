"""The clipped loss and DPO against TRL's own on the same batch: recorded losses, and TRL itself if
installed."""

import importlib.util
import json
from typing import Any

import pytest
import torch

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import AlgorithmConfig
from tests.helpers.group_samples import group_samples
from tests.helpers.trl_losses import ADVANTAGES, FILE, LENGTHS, batch, cases, mask

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))["cases"]


def gradient(case: dict[str, Any]) -> torch.Tensor:
    """Our gradient with respect to the current log-probs, [4, 7], 0 at padding; the mean over pairs for
    DPO."""
    old, current = batch(case["seed"])
    live = mask().bool()
    options = AlgorithmConfig(objective=case["objective"], reduction="sum", **case["options"])
    made = WeightedObjective(options, len(LENGTHS))
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    counts = torch.ones(len(LENGTHS), dtype=torch.float64)
    margins, scale = None, 1.0
    if case["objective"] == "dpo":
        advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
        ratios = ((current - old) * live).sum(dim=1)
        margins, scale = (
            made.rule.group_values(group_samples(ratios, [1.0] * 4, [0, 1, 0, 1], advantages)),
            0.5,
        )
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    trained = torch.ones(sum(LENGTHS), dtype=torch.bool)
    coefficients = made.token_coefficients(
        old[live], trained, cu_seqlens, counts, margins, advantages, current[live]
    )
    found = torch.zeros(live.shape, dtype=torch.float64)
    found[live] = -scale * coefficients.double()
    return found


@pytest.mark.parametrize(
    "case", RECORDED, ids=[f"{row['objective']} {row['options']} {row['seed']}" for row in RECORDED]
)
def test_gradients_equal_those_of_trl(case: dict[str, Any]) -> None:
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient(case), expected, rtol=1e-6, atol=1e-7)
    assert expected.abs().max() > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_computes_what_is_recorded() -> None:
    for case, recorded in zip(cases(), RECORDED, strict=True):
        assert {**case, "loss": 0, "gradient": 0} == {**recorded, "loss": 0, "gradient": 0}
        assert case["loss"] == pytest.approx(recorded["loss"], rel=1e-9)
        torch.testing.assert_close(torch.tensor(case["gradient"]), torch.tensor(recorded["gradient"]))
