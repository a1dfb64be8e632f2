"""Stop a run when its steps change no weight or when its engine samples a policy other than the trainer's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsc_mcore.config import CollectiveRunError, Config, ConfigError
from rlsc_mcore.observability.mismatch import coarser, mismatched_steps, stop_limit
from rlsc_mcore.observability.step_metrics import DESCRIPTIONS, read_number
from rlsc_mcore.run.folder import SKIPPED_FOLDER

_CONDITION = re.compile(r"\s*([a-z_0-9/]+)\s*([<>])\s*([-+0-9.eE]+)(x?)\s*")
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def compared_dtype(config: Config) -> str:
    """Return the data type that sets the limits for the difference between trainer and engine."""
    return coarser(config.model.dtype, config.rollout.dtype or config.model.dtype)


def skipped_steps(rows: Rows) -> list[int]:
    """Return the indices of the steps that changed no weight because loss or gradient was not finite."""
    return [row["step"] for row in rows if row.get("skipped")]


def count_mismatched_steps(rows: Rows, config: Config) -> int:
    """Count the most recent consecutive steps whose answers were sampled by other weights than the trainer's.

    Returns 0 if `observability.max_mismatched_steps` is 0; such steps then only cause a warning.
    """
    options = config.observability
    if not options.max_mismatched_steps:
        return 0
    return mismatched_steps(rows, stop_limit(compared_dtype(config), options.max_log_prob_gap))


def stop_when_skipping(rows: Rows, config: Config, run_dir: Path, save: Callable[[], None]) -> None:
    """Call `save` and raise `CollectiveRunError` after too many consecutive skipped steps.

    `training.max_skipped_steps` is the limit. A resumed run continues the count.
    """
    limit = config.training.max_skipped_steps
    last = rows[-limit:]
    if len(last) == limit and all(row["skipped"] for row in last):
        save()
        raise CollectiveRunError(
            f"{limit} steps in a row were not finite and were skipped (training.max_skipped_steps); the "
            "weights of before them are "
            f"saved, the batches are in {run_dir / SKIPPED_FOLDER}: lower optimizer.lr, or look for the "
            "answers that break it"
        )


def stop_when_mismatched(rows: Rows, config: Config, finish_saving: Callable[[], None]) -> None:
    """Call `finish_saving` and raise `CollectiveRunError` after too many consecutive mismatched steps."""
    count = count_mismatched_steps(rows, config)
    if not count or count < config.observability.max_mismatched_steps:
        return
    finish_saving()
    gap = rows[-1]["log_prob_gap_mean"]
    raise CollectiveRunError(
        f"trainer and engine disagreed on the sampled tokens in {count} steps in a row, by {gap:.2e} per "
        "token in the last "
        "(observability.max_log_prob_gap): the engine does not sample the policy that is trained; these "
        "steps are not saved, "
        f"the last checkpoint is whole: go on from it with --resume, which builds a new engine"
    )


@dataclass(frozen=True)
class StopCondition:
    """One condition of `training.stop_on`."""

    text: str
    path: tuple[str, ...]  # of the number in a row of metrics.jsonl
    is_upper: bool  # the metric must not exceed the value; else it must not fall below it
    value: float
    is_relative: bool  # the value is a multiple of the metric at the first step

    @staticmethod
    def parse(text: str, *, field: str = "training.stop_on") -> "StopCondition":
        """Read `METRIC<VALUE`, `METRIC>VALUE` or one of them with a relative value.

        Raises ConfigError naming `field`.
        """
        match = _CONDITION.fullmatch(text)
        try:
            value = float(match[3]) if match is not None else None
        except ValueError:
            value = None
        if match is None or value is None:
            raise ConfigError(
                f"{field}: expected METRIC<VALUE or METRIC>VALUE, such as mean_length<0.5x, got {text!r}"
            )
        path = tuple(match[1].split("/"))
        if path[0] not in DESCRIPTIONS:
            raise ConfigError(
                f"{field}: {text!r}: no metric {match[1]} in metrics.jsonl (docs/metrics.md lists them)"
            )
        return StopCondition(text.strip(), path, match[2] == ">", value, bool(match[4]))

    def holds(self, row: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
        """Return whether the condition holds in `row`; False if a number is missing."""
        value, limit = read_number(row, *self.path), self.value
        if self.is_relative:
            start = read_number(first, *self.path)
            if start is None:
                return False
            limit = self.value * start
        if value is None:
            return False
        return value > limit if self.is_upper else value < limit

    def held(self, rows: Rows, stop_after: int) -> bool:
        """Return whether the condition holds in each of the last `stop_after` rows of a run."""
        last = rows[-stop_after:]
        return len(last) == stop_after and all(self.holds(row, rows[0]) for row in last)


def stop_conditions(config: Config) -> list[StopCondition]:
    """Return the conditions of `training.stop_on`; raises ConfigError that names the first wrong one."""
    return [StopCondition.parse(text) for text in config.training.stop_on]


def met_condition(rows: Rows, config: Config) -> str | None:
    """Return the first condition of `training.stop_on` that held in each of the last `stop_after` steps.

    The rows are equal on all ranks, and so is the result.
    """
    held = (each for each in stop_conditions(config) if each.held(rows, config.training.stop_after))
    return next((condition.text for condition in held), None)
