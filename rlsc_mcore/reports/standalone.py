"""Combine several charts into one SVG file with its own colours for light and dark mode."""

import re
from collections.abc import Sequence
from html import escape
from importlib import resources

PANELS_PER_ROW = 2
_GAP = 24
_TITLE_HEIGHT = 26


def chart_css() -> str:
    """Return the style sheet with the colours of the charts."""
    return resources.files(__package__).joinpath("charts.css").read_text(encoding="utf-8")


def standalone_svg(panels: Sequence[tuple[str, str]], caption: str) -> str:
    """Arrange (title, <svg>) panels in rows of two; return the text of a self-contained .svg file."""
    placed: list[str] = []
    sizes = [_size(svg) for _, svg in panels]
    column_width = max((width for width, _ in sizes), default=0.0)
    top = 8.0
    for start in range(0, len(panels), PANELS_PER_ROW):
        row = panels[start : start + PANELS_PER_ROW]
        tallest = 0.0
        for column, (title, svg) in enumerate(row):
            left = 8 + column * (column_width + _GAP)
            width, height = sizes[start + column]
            inner = svg.replace(
                "<svg ",
                f'<svg x="{left:g}" y="{top + _TITLE_HEIGHT}" width="{width:g}" height="{height:g}" ',
                1,
            )
            placed.append(f'<text class="panel" x="{left:g}" y="{top + 16}">{escape(title)}</text>{inner}')
            tallest = max(tallest, height)
        top += tallest + _TITLE_HEIGHT + 10
    columns = min(PANELS_PER_ROW, len(panels))
    width = 16 + columns * column_width + (columns - 1) * _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top + 24:g}" width="{width:g}" height="{top + 24:g}" role="img" '
        f'aria-label="{escape(caption, quote=True)}"><style>{chart_css()}</style><rect class="paper" width="100%" height="100%"/>'
        f'{"".join(placed)}<text class="axis" x="8" y="{top + 12:g}">{escape(caption)}</text></svg>\n'
    )


def _size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    assert found is not None, "a chart without a viewBox"
    return float(found[1]), float(found[2])
