"""Where the ops' tests run on a GPU: every backend there, and what `auto` makes of them."""

import pytest

from tests.unit.ops.conftest import Placement, placements, usable


@pytest.fixture(
    params=placements("cuda:auto,cuda:triton,cuda:cuda,cuda:reference"),
    ids=lambda p: f"{p.device.type}-{p.backend}",
)
def placement(request: pytest.FixtureRequest) -> Placement:
    return usable(request.param)
