"""Choose each objective's learning rate on validation questions, before the runs that are compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.evaluation.over_seeds import seed_average
from rlsc_mcore.experiments.runs import Experiment, Variant
from rlsc_mcore.observability.console import Reporter

LR_FLAG = "--optimizer.lr"


@dataclass(frozen=True)
class ChosenRate:
    """The learning rate of one objective, with the validation accuracy of every rate that was tried."""

    rate: str
    accuracy: Mapping[str, float]  # rate -> mean over the evaluated temperatures of the boxed accuracy


def parse_rates(text: str | None, flags: Sequence[str]) -> tuple[str, ...]:
    """Parse rates such as `1e-4,5e-4`; empty without any. Raises ConfigError naming --learning-rates."""
    if text is None:
        return ()
    rates = tuple(part.strip() for part in text.split(","))
    try:
        values = [float(rate) for rate in rates]
    except ValueError:
        values = []
    if not values or len(set(values)) != len(values) or not all(0 < value < math.inf for value in values):
        raise ConfigError(
            f"--learning-rates: expected different positive numbers like 1e-4,5e-4, got {text!r}"
        )
    if any(flag.partition("=")[0] == LR_FLAG for flag in flags):
        raise ConfigError(f"--learning-rates: chooses {LR_FLAG}; give only one of the two")
    return rates


def check_validation(path: str | None, evaluation: str, split: str) -> None:
    """Check that the questions of `path` can choose a learning rate.

    Raises ConfigError naming --validation if it is missing or equals `evaluation`, if it cannot be read, or
    if a question has no answer. `split` is that of a hub data set.
    """
    field = "--validation"
    if path is None or path == evaluation:
        raise ConfigError(
            f"{field}: expected the questions that choose the learning rates, other ones than evaluation.path "
            f"{evaluation}"
        )
    for question in read_questions(path, split=split, field=field):
        if question.answer is None:
            raise ConfigError(f"{field}: {path}: question {question.index} has no `answer` to grade against")


def choose_rates(
    experiment: Experiment,
    variants: Sequence[Variant],
    rates: Sequence[str],
    validation: str,
    report: Reporter,
) -> dict[str, ChosenRate]:
    """Train every variant with every rate, and return for each the rate of the best validation accuracy.

    The runs use the first seed of `experiment` and are in its folder, under `validation`; finished ones are
    not repeated. Of equal accuracies the smaller rate is chosen. Variants that train nothing have no rate.
    """
    trained = [variant for variant in variants if variant.temperature_factor is None]
    flags = (*experiment.flags, f"--evaluation.path={validation}")
    tried = Experiment(experiment.config_file, flags, experiment.seeds[:1], experiment.folder / "validation")
    tried.run([_with_rate(variant, rate, tag=True) for variant in trained for rate in rates], report)
    chosen = {}
    for variant in trained:
        accuracy = {rate: _accuracy(tried, _with_rate(variant, rate, tag=True)) for rate in rates}
        best = max(rates, key=lambda rate: (accuracy[rate], -float(rate)))
        chosen[variant.name] = ChosenRate(best, accuracy)
    return chosen


def with_chosen_rates(variants: Sequence[Variant], chosen: Mapping[str, ChosenRate]) -> list[Variant]:
    """Return the variants with the flags of their chosen rates."""
    return [
        _with_rate(variant, chosen[variant.name].rate) if variant.name in chosen else variant
        for variant in variants
    ]


def _with_rate(variant: Variant, rate: str, *, tag: bool = False) -> Variant:
    name = f"{variant.name}_lr{rate}" if tag else variant.name
    return replace(variant, name=name, flags=(*variant.flags, f"{LR_FLAG}={rate}"))


def _accuracy(experiment: Experiment, variant: Variant) -> float:
    """Return the boxed accuracy: the mean over questions, and then over the evaluated temperatures."""
    answers = experiment.answers(variant, experiment.seeds[0], "after")
    means = []
    for temperature in sorted({answer.temperature for answer in answers}):
        by_question = seed_average([answers], temperature, "strict")
        means.append(sum(by_question.values()) / len(by_question))
    return sum(means) / len(means)
