"""Compute axes of charts: scales to pixels, round ticks and short labels."""

import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear axis from data to pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    stop: float  # pixel of `high`

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 round numbers that span [low, high]; if low >= high, or nearly so, the range
    is widened.

    Raises ValueError if a bound is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"an axis needs finite bounds, got {low} and {high}")
    if high - low < sys.float_info.min * most:  # the same value, or a distance without a logarithm
        room = abs(low) * 0.1
        room = room if room > sys.float_info.min * most else 1.0
        low, high = low - room, high + room
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(value: float, step: float | None = None) -> str:
    """Format a number for an axis or a tooltip: 0.25, 12.5, 2e-05.

    With `step`, the distance of ticks, use enough digits to distinguish neighbouring ticks.
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-4:
        return f"{value:.3g}"
    if step is not None and step < 5e-4:
        return f"{value:.3g}"
    if step is not None:
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9) + (0 if _is_round(step) else 1))}f}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _is_round(step: float) -> bool:
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    return abs(mantissa - round(mantissa)) < 1e-6
