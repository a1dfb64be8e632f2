"""Options of the chaos tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add how long to go on, and where to begin."""
    parser.addoption(
        "--chaos-minutes", type=float, default=4.0, help="begin no new round of random faults after this time"
    )
    parser.addoption(
        "--chaos-seed",
        type=int,
        default=0,
        help="seed of the first round; each further round takes the next one",
    )
    parser.addoption("--soak-steps", type=int, default=300, help="optimizer steps of the soak")
    parser.addoption("--soak-output", help="also write the soak's result to this JSON file")
