"""Where the ops' tests run: every backend that this process can use on a CPU.

RLSC_TEST_PLACEMENTS="cpu:triton" narrows it; test_triton_interpreter.py sets it in a process of its own,
because Triton looks for TRITON_INTERPRET once, when it is imported.
"""

import os
from typing import NamedTuple

import pytest
import torch

from rlsc_mcore.ops.dispatch import OFFERS, why_not


class Placement(NamedTuple):
    """A device and the backend to run on it."""

    device: torch.device
    backend: str


def placements(default: str) -> list[Placement]:
    """Read RLSC_TEST_PLACEMENTS: device:backend, separated by commas."""
    pairs = (entry.split(":") for entry in os.environ.get("RLSC_TEST_PLACEMENTS", default).split(","))
    return [Placement(torch.device(device), backend) for device, backend in pairs]


def usable(placement: Placement) -> Placement:
    """Return the placement, or skip the test with the reason why it cannot run here."""
    if placement.backend != "auto":
        for op in OFFERS[placement.backend]:
            if (reason := why_not(placement.backend, op, placement.device.type)) is not None:
                pytest.skip(f"{placement.backend} on {placement.device}: {reason}")
    return placement


@pytest.fixture(params=placements("cpu:reference,cpu:cpp"), ids=lambda p: f"{p.device.type}-{p.backend}")
def placement(request: pytest.FixtureRequest) -> Placement:
    return usable(request.param)
