"""Check a quick start's summary.json: `python -m tests.e2e.check_quickstart runs/quickstart/summary.json`.

It must have every number of the before/after table, the engine must have held exactly the exported weights
after the last swap, and the sampled, strictly graded accuracy must have risen by more than three combined
standard errors.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

MEASURES = (
    "accuracy_t0.5",
    "accuracy_t1",
    "greedy",
    "lenient_t0.5",
    "lenient_t1",
    "boxed_share",
    "confidence_f",
    "mean_length",
)
SAMPLED = ("accuracy_t0.5", "accuracy_t1")
PHASES = ("install", "train", "total")
REQUIRED_STANDARD_ERRORS = 3.0
# Groups of the second table, and whether RLSC must make them better or worse.
THREE_MODES = {"rare right mode": 1, "wrong mode": -1, "many wordings": -1}


def check(summary: dict[str, Any]) -> list[str]:
    """Return what is wrong with a summary, in words; empty when nothing is."""
    problems = []
    for side in ("before", "after"):
        for name in MEASURES:
            measure = summary.get(side, {}).get(name)
            if not isinstance(measure, dict) or not all(
                _is_number(measure.get(k)) for k in ("mean", "standard_error")
            ):
                problems.append(
                    f"{side}.{name}: expected finite numbers mean and standard_error, got {measure!r}"
                )
    problems += [
        f"seconds.{name}: expected a number of at least 0, got {summary.get('seconds', {}).get(name)!r}"
        for name in PHASES
        if not (_is_number(seconds := summary.get("seconds", {}).get(name)) and seconds >= 0)
    ]
    problems += check_three_modes(summary.get("three_modes"))
    if summary.get("engine_equals_export") is not True:
        problems.append(f"engine_equals_export: expected true, got {summary.get('engine_equals_export')!r}")
    if not problems:
        rises = {name: rise_in_standard_errors(summary, name) for name in SAMPLED}
        if max(rises.values()) <= REQUIRED_STANDARD_ERRORS:
            told = ", ".join(f"{name} {rise:+.1f}" for name, rise in rises.items())
            problems.append(
                f"sampled accuracy rose too little, in combined standard errors: {told}; more than 3 is "
                "expected"
            )
    return problems


def check_three_modes(groups: Any) -> list[str]:
    """Return which group of the second table did not change as it must; empty when all did."""
    problems = []
    for group, sign in THREE_MODES.items():
        scores = groups.get(group) if isinstance(groups, dict) else None
        try:
            rise = sign * rise_in_standard_errors(scores, "accuracy_t0.5")  # type: ignore[arg-type]
        except (TypeError, KeyError):
            problems.append(f"three_modes.{group}: expected scores before and after, got {scores!r}")
            continue
        if not rise > REQUIRED_STANDARD_ERRORS:
            wanted = "rise" if sign > 0 else "fall"
            problems.append(
                f"three_modes.{group}: accuracy at T = 0.5 must {wanted} by more than 3 standard errors"
            )
    return problems


def rise_in_standard_errors(summary: dict[str, Any], name: str) -> float:
    """Return (after - before) / sqrt(se_before^2 + se_after^2) of one measure."""
    before, after = summary["before"][name], summary["after"][name]
    combined = math.hypot(before["standard_error"], after["standard_error"])
    difference = after["mean"] - before["mean"]
    return (
        difference / combined if combined > 0 else math.copysign(math.inf, difference) if difference else 0.0
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main() -> int:
    """Check the file named on the command line, print the outcome, return 0 or 1."""
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    problems = check(summary)
    for problem in problems:
        print(f"{sys.argv[1]}: {problem}")
    if not problems:
        for name in MEASURES:
            before, after = summary["before"][name], summary["after"][name]
            print(
                f"{name:13} {before['mean']:8.4f} ± {before['standard_error']:.4f} -> {after['mean']:8.4f} ± "
                f"{after['standard_error']:.4f}"
                f"  ({rise_in_standard_errors(summary, name):+.1f} standard errors)"
            )
        print("seconds " + ", ".join(f"{name} {summary['seconds'][name]:.1f}" for name in PHASES))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
