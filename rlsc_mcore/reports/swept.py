"""Draw a score against a swept option: one line per combination of the other options, with error bars and the
value of each seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rlsc_mcore.reports.axes import Scale, round_ticks, short_number
from rlsc_mcore.reports.charts import DASHES, NUM_COLOURS

LOG_FROM_RATIO = 20.0  # the axis is logarithmic if largest / smallest positive value is at least this
_LEFT, _RIGHT, _LINE = 46, 12, 18
_CHARACTER_PX, _DODGE_PX, _CAP_PX, _SEED_PX = 6.4, 8.0, 3.0, 4.0


@dataclass(frozen=True)
class SweptPoint:
    """The score for one value of the swept option."""

    value: str  # as written on the command line
    mean: float
    low: float
    high: float
    per_seed: Sequence[float] = ()


@dataclass(frozen=True)
class SweptLine:
    """The line of one combination of the other swept options; the name is empty if there are none."""

    name: str
    points: Sequence[SweptPoint]


def axis_places(values: Sequence[str]) -> list[float]:
    """Return the position of each value on the axis.

    If a value is not a number, the positions are evenly spaced. If the positive values span a factor of 20 or
    more and none is negative, the positions are logarithms to base 10, and 0 is one decade left of the
    smallest positive value. Otherwise the positions are the values.
    """
    numbers = _numbers(values)
    if numbers is None:
        return [float(place) for place in range(len(values))]
    positive = sorted(number for number in numbers if number > 0)
    if min(numbers) < 0 or not positive or positive[-1] < LOG_FROM_RATIO * positive[0]:
        return numbers
    return [math.log10(number) if number > 0 else math.log10(positive[0]) - 1.0 for number in numbers]


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def swept_chart(
    lines: Sequence[SweptLine],
    values: Sequence[str],
    *,
    name: str,
    x_label: str,
    reference: float | None = None,
    reference_name: str = "base",
    width: int = 420,
) -> str:
    """Draw the lines over `values`, and a dashed line at `reference`; return an <svg>."""
    place = dict(zip(values, axis_places(values), strict=True))
    known = [
        number
        for line in lines
        for p in line.points
        for number in (p.mean, p.low, p.high, *p.per_seed)
        if math.isfinite(number)
    ]
    if not known:
        return '<p class="empty">nothing was recorded</p>'
    y_ticks = round_ticks(*_bounds([*known, *([] if reference is None else [reference])]), 4)
    legend, top = _legend(lines, reference_name if reference is not None else None, width)
    bottom = top + 160
    y = Scale(y_ticks[0], y_ticks[-1], bottom, top)
    low, high = min(place.values()), max(place.values())
    margin = 24
    x = Scale(low, high if high > low else low + 1.0, _LEFT + margin, width - _RIGHT - margin)
    parts = [legend, _axes(y_ticks, y, {value: x(at) for value, at in place.items()}, bottom, x_label, width)]
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(reference):.1f}" y2="{y(reference):.1f}"/>'
        )
    for index, line in enumerate(lines):
        shift = _DODGE_PX * (index - (len(lines) - 1) / 2)
        if _numbers(values) is not None:  # values that are not numbers are not connected by a line
            parts.append(_curve(line, index, {value: x(at) + shift for value, at in place.items()}, y))
        parts.append(_marks(line, index, {value: x(at) + shift for value, at in place.items()}, y, x_label))
    label = escape(f"{name}: {_summary(lines, reference, reference_name)}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {width} {bottom + 34}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _curve(line: SweptLine, index: int, x: dict[str, float], y: Scale) -> str:
    dash = DASHES[index % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    path = " ".join(
        f"{x[point.value]:.1f},{y(point.mean):.1f}" for point in line.points if math.isfinite(point.mean)
    )
    return f'<polyline class="line c{index % NUM_COLOURS}"{dashes} points="{path}"/>'


def _marks(line: SweptLine, index: int, x: dict[str, float], y: Scale, x_label: str) -> str:
    colour, parts = f"c{index % NUM_COLOURS}", []
    points = [point for point in line.points if math.isfinite(point.mean)]
    for point in points:
        at = x[point.value]
        if math.isfinite(point.low) and math.isfinite(point.high):
            low, high = y(point.low), y(point.high)
            caps = "".join(f"M{at - _CAP_PX:.1f},{edge:.1f}H{at + _CAP_PX:.1f}" for edge in (low, high))
            parts.append(f'<path class="errorbar {colour}" d="M{at:.1f},{low:.1f}V{high:.1f}{caps}"/>')
        parts += [
            f'<circle class="seed {colour}" cx="{at + _SEED_PX:.1f}" cy="{y(seed):.1f}" r="2"/>'
            for seed in point.per_seed
        ]
        text = f"{line.name + ', ' if line.name else ''}{x_label} {point.value}: {short_number(point.mean)}"
        text += f" ({short_number(point.low)} to {short_number(point.high)})"
        parts.append(
            f'<circle class="point {colour}" cx="{at:.1f}" cy="{y(point.mean):.1f}" r="4"/>'
            f'<circle class="hit" cx="{at:.1f}" cy="{y(point.mean):.1f}" r="9"><title>{escape(text)}</title></circle>'
        )
    return "".join(parts)


def _axes(
    y_ticks: Sequence[float], y: Scale, x_ticks: dict[str, float], bottom: float, x_label: str, width: int
) -> str:
    step = y_ticks[1] - y_ticks[0]
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short_number(tick, step)}</text>'
        for tick in y_ticks
    )
    marks = "".join(
        f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(value)}</text>'
        for value, at in x_ticks.items()
    )
    return f'{grid}{marks}<text class="axis" x="{width - _RIGHT}" y="{bottom + 30}" text-anchor="end">{escape(x_label)}</text>'


def _legend(lines: Sequence[SweptLine], reference_name: str | None, width: int) -> tuple[str, float]:
    """Draw the legend above the chart with as many names per row as fit; return it and the top of the
    chart."""
    entries = [
        (line.name, f'class="line c{i % NUM_COLOURS}"', DASHES[i % len(DASHES)])
        for i, line in enumerate(lines)
        if len(lines) > 1
    ]
    entries += [(reference_name, 'class="reference"', "")] if reference_name is not None else []
    parts, x, row = [], float(_LEFT), 0
    for text, style, dash in entries:
        size = 26 + _CHARACTER_PX * len(text) + 14
        if x > _LEFT and x + size > width:
            x, row = float(_LEFT), row + 1
        middle = 8 + _LINE * row
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<line {style}{dashes} x1="{x:.1f}" x2="{x + 20:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<text class="tick" x="{x + 26:.1f}" y="{middle + 4}">{escape(text)}</text>'
        )
        x += size
    return "".join(parts), 10.0 + (_LINE * (row + 1) if entries else 0)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _summary(lines: Sequence[SweptLine], reference: float | None, reference_name: str) -> str:
    said = [
        f"{line.name + ': ' if line.name else ''}"
        + ", ".join(f"{short_number(p.mean)} at {p.value}" for p in line.points)
        for line in lines
    ]
    return "; ".join(said + ([] if reference is None else [f"{reference_name} {short_number(reference)}"]))
