"""Draw charts as inline SVG that scales with the page and takes its colours from CSS variables.

Every chart has a name and a summary for screen readers. Single values are shown as tooltips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rlsc_mcore.reports.axes import Scale, round_ticks, short_number

NUM_COLOURS = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # dash patterns distinguish runs in addition to colour


@dataclass(frozen=True)
class Line:
    """One curve; a point with the value None is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    dash: int = 0
    band: Sequence[tuple[float, float, float]] = field(default=())  # (x, low, high)


@dataclass(frozen=True)
class Dot:
    """One estimate with its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0
    hollow: bool = False


def line_chart(
    lines: Sequence[Line], *, name: str, x_label: str, unit: str = "", width: int = 340, height: int = 180
) -> str:
    """Draw curves over a common x axis; return an <svg>, or a <p> if no line has a finite point."""
    finite = [(x, y) for line in lines for x, y in line.points if y is not None and math.isfinite(y)]
    if not finite:
        return '<p class="empty">nothing was recorded</p>'
    bounds = [
        edge for line in lines for _, low, high in line.band for edge in (low, high) if math.isfinite(edge)
    ]
    y_ticks = round_ticks(min([y for _, y in finite] + bounds), max([y for _, y in finite] + bounds), 4)
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    x_ticks = [tick for tick in round_ticks(x_low, x_high, 6) if x_low - 1e-9 <= tick <= x_high + 1e-9] or [
        x_low
    ]
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    left, right, top, bottom = 46, 12, 10, 34
    x = Scale(x_low, x_high, left, width - right)
    y = Scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    parts = [_y_axis(y_ticks, y, left, width - right), _x_axis(x_ticks, x, height - bottom, x_label, width)]
    for line in lines:
        if line.band:
            upper = [f"{x(px):.1f},{y(high):.1f}" for px, _, high in line.band]
            lower = [f"{x(px):.1f},{y(low):.1f}" for px, low, _ in reversed(line.band)]
            parts.append(
                f'<polygon class="band c{line.colour % NUM_COLOURS}" points="{" ".join(upper + lower)}"/>'
            )
        for piece in _pieces(line.points):
            path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in piece)
            dash = f' stroke-dasharray="{DASHES[line.dash % len(DASHES)]}"' if line.dash % len(DASHES) else ""
            parts.append(f'<polyline class="line c{line.colour % NUM_COLOURS}"{dash} points="{path}"/>')
        for px, py in line.points:
            if py is None or not math.isfinite(py):
                continue
            text = f"{line.name}, {x_label} {short_number(px)}: {short_number(py)}{unit}"
            parts.append(
                f'<circle class="point c{line.colour % NUM_COLOURS}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="2.4"/>'
                f'<circle class="hit" cx="{x(px):.1f}" cy="{y(py):.1f}" r="7"><title>{escape(text)}</title></circle>'
            )
    summary = "; ".join(
        _trend(line, unit) for line in lines[:6] if any(value is not None for _, value in line.points)
    )
    return _svg(width, height, name, summary, "".join(parts))


def dot_chart(
    dots: Sequence[Dot],
    *,
    name: str,
    reference: float | None = None,
    unit: str = "",
    width: int = 420,
    labels_above: bool = False,
) -> str:
    """Draw one row per estimate with its interval, and a line at `reference`; return an <svg>.

    `labels_above` puts the labels above their rows instead of to the left, so that long labels are readable
    on a narrow screen.
    """
    known = [v for dot in dots for v in (dot.value, dot.low, dot.high) if v is not None and math.isfinite(v)]
    if not known:
        return '<p class="empty">nothing was recorded</p>'
    ticks = round_ticks(min(known), max(known), 4)
    right, top, row, bottom = 58, 6, 40 if labels_above else 26, 26
    left = 14 if labels_above else min(170, 8 + 7 * max(len(dot.label) for dot in dots))
    height = top + row * len(dots) + bottom
    x = Scale(ticks[0], ticks[-1], left, width - right)
    step = ticks[1] - ticks[0]
    parts = [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - bottom}"/>'
        f'<text class="tick" x="{x(tick):.1f}" y="{height - bottom + 15}" text-anchor="middle">{short_number(tick, step)}</text>'
        for tick in ticks
    ]
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{x(reference):.1f}" x2="{x(reference):.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
    for index, dot in enumerate(dots):
        middle = top + row * (index + (0.75 if labels_above else 0.5))
        place = (
            f'x="{left}" y="{middle - 13:g}"'
            if labels_above
            else f'x="{left - 8}" y="{middle + 4:g}" text-anchor="end"'
        )
        colour = f"c{dot.colour % NUM_COLOURS}"
        interval = ""
        if (
            dot.low is not None
            and dot.high is not None
            and math.isfinite(dot.low)
            and math.isfinite(dot.high)
        ):
            interval = f" ({short_number(dot.low)} to {short_number(dot.high)})"
            parts.append(
                f'<line class="whisker {colour}" x1="{x(dot.low):.1f}" x2="{x(dot.high):.1f}" y1="{middle:g}" y2="{middle:g}"/>'
            )
        parts.append(
            f'<text class="label" {place}>{escape(dot.label)}</text>'
            f'<circle class="dot {colour}{" hollow" if dot.hollow else ""}" cx="{x(dot.value):.1f}" cy="{middle:g}" r="5">'
            f"<title>{escape(dot.label)}: {short_number(dot.value)}{unit}{interval}</title></circle>"
            f'<text class="value" x="{width - right + 10}" y="{middle + 4:g}">{dot.value:.3f}</text>'
        )
    summary = "; ".join(f"{dot.label} {short_number(dot.value)}{unit}" for dot in dots)
    return _svg(width, height, name, summary, "".join(parts))


def stacked_bars(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    name: str,
    x_label: str,
    unit: str,
    width: int = 860,
) -> str:
    """Draw one bar per label with the series stacked in order; return an <svg>."""
    totals = [sum(values[i] for _, values in series) for i in range(len(labels))]
    if not totals or max(totals) <= 0:
        return '<p class="empty">nothing was recorded</p>'
    height, left, right, top, bottom = 220, 46, 12, 10, 34
    ticks = round_ticks(0.0, max(totals), 4)
    y = Scale(0.0, ticks[-1], height - bottom, top)
    slot = (width - left - right) / len(labels)
    parts = [_y_axis(ticks, y, left, width - right)]
    every = max(1, math.ceil(len(labels) / 20))
    for index, label in enumerate(labels):
        low, x = 0.0, left + slot * index
        for colour, (series_name, values) in enumerate(series):
            size = values[index]
            parts.append(
                f'<rect class="fill c{colour % NUM_COLOURS}" x="{x + 0.1 * slot:.1f}" width="{max(0.5, 0.8 * slot):.1f}" '
                f'y="{y(low + size):.1f}" height="{max(0.0, y(low) - y(low + size)):.1f}">'
                f"<title>{escape(x_label)} {escape(label)}, {escape(series_name)}: "
                f"{short_number(size)}{unit}</title></rect>"
            )
            low += size
        if index % every == 0:
            parts.append(
                f'<text class="tick" x="{x + slot / 2:.1f}" y="{height - bottom + 15}" text-anchor="middle">{escape(label)}</text>'
            )
    parts.append(
        f'<text class="axis" x="{width - right}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    means = "; ".join(
        f"{series_name} {short_number(sum(values) / len(values))}{unit} on average"
        for series_name, values in series
    )
    return _svg(width, height, name, means, "".join(parts))


def sparkline(values: Sequence[float], *, name: str, width: int = 120, height: int = 28) -> str:
    """Draw a curve without axes and mark its last point; return an <svg>, or "" for fewer than two values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    x = Scale(0, len(finite) - 1, 3, width - 3)
    y = Scale(low, high if high > low else low + 1, height - 4, 4)
    path = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(finite))
    end = f'<circle class="point c0" cx="{x(len(finite) - 1):.1f}" cy="{y(finite[-1]):.1f}" r="2.6"/>'
    summary = f"from {short_number(finite[0])} to {short_number(finite[-1])}"
    return _svg(
        width, height, name, summary, f'<polyline class="line c0" points="{path}"/>{end}', kind="spark"
    )


def _svg(width: float, height: float, name: str, summary: str, content: str, kind: str = "chart") -> str:
    label = escape(f"{name}: {summary}" if summary else name, quote=True)
    return f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{content}</svg>'


def _y_axis(ticks: Sequence[float], y: Scale, left: float, right: float) -> str:
    step = ticks[1] - ticks[0]
    return "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short_number(tick, step)}</text>'
        for tick in ticks
    )


def _x_axis(ticks: Sequence[float], x: Scale, bottom: float, label: str, width: float) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    marks = "".join(
        f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{short_number(tick, step)}</text>'
        for tick in ticks
    )
    return (
        marks
        + f'<text class="axis" x="{width - 12}" y="{bottom + 30}" text-anchor="end">{escape(label)}</text>'
    )


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if len(piece) > 1]


def _trend(line: Line, unit: str) -> str:
    values = [value for _, value in line.points if value is not None and math.isfinite(value)]
    if not values:
        return line.name
    return f"{line.name} from {short_number(values[0])} to {short_number(values[-1])}{unit}"
