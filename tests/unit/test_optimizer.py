"""The learning rate of a step."""

import math

import pytest

from rlsc_mcore.config import OptimizerConfig
from rlsc_mcore.training.optimizer import learning_rate, set_learning_rate


def rates(num_steps: int, **options: object) -> list[float]:
    return [learning_rate(OptimizerConfig(**options), step, num_steps) for step in range(num_steps)]  # type: ignore[arg-type]


def test_constant_by_default() -> None:
    assert rates(4, lr=2e-5) == [2e-5] * 4


def test_warm_up_rises_evenly_to_the_peak_and_is_never_zero() -> None:
    assert rates(6, lr=1.0, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warm_up_longer_than_the_run() -> None:
    assert rates(2, lr=1.0, warmup_steps=9, schedule="cosine") == pytest.approx([0.1, 0.2])


def test_linear_decay_ends_at_the_smallest_rate() -> None:
    found = rates(6, lr=1.0, min_lr=0.2, warmup_steps=2, schedule="linear")
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4])
    assert learning_rate(
        OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="linear"), 6, 6
    ) == pytest.approx(0.2)


def test_cosine_decay() -> None:
    found = rates(5, lr=1.0, min_lr=0.1, schedule="cosine")
    assert found == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)])


def test_every_group_gets_the_rate_times_its_factor() -> None:
    class Groups:
        param_groups = [{"lr": 0.0}, {"lr": 0.0, "lr_mult": 0.5}]  # noqa: RUF012

    set_learning_rate(Groups, 2.0)
    assert [group["lr"] for group in Groups.param_groups] == [2.0, 1.0]
