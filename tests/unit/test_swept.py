"""The figure of a sweep: where values stand on the axis, what is drawn for each, and what is left out."""

import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from rlsc_mcore.experiments.runs import combination
from rlsc_mcore.experiments.sweep import figure
from rlsc_mcore.reports.standalone import chart_css
from rlsc_mcore.reports.swept import SweptLine, SweptPoint, axis_places, swept_chart

ALPHAS, SAMPLES = ["0", "0.01", "0.1", "1"], ["4", "64"]


def row(mean: float, base: float = 0.2) -> dict[str, Any]:
    score = {
        "mean": mean,
        "standard_error": 0.02,
        "low": mean - 0.04,
        "high": mean + 0.04,
        "per_seed": [mean - 0.01, mean + 0.01],
    }
    return {"accuracy_t1": score | {"change": {"mean": mean - base}}}


def drawn(svg: str, kind: str) -> list[Any]:
    return [
        element for element in ET.fromstring(svg).iter() if (element.get("class") or "").split()[:1] == [kind]
    ]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        (["0", "0.01", "0.1", "1"], [-3, -2, -1, 0]),  # logarithmic, 0 a decade left of the smallest
        (["4", "16", "64"], [4, 16, 64]),  # less than 20-fold
        (["1e-5", "1e-3"], [-5, -3]),
        (["-1", "1", "100"], [-1, 1, 100]),
        (["sequence", "token"], [0, 1]),
        (["1", "inf"], [0, 1]),
        (["0"], [0]),
    ],
)
def test_values_stand_where_they_belong(values: list[str], places: list[float]) -> None:
    assert axis_places(values) == pytest.approx(places)


def test_one_line_per_setting_of_the_other_options() -> None:
    axes = {"rollout.num_samples": ["16"], "algorithm.alpha": ALPHAS, "data.template": ["chat", "none"]}
    rows = {"base": row(0.2)}
    for place, values in enumerate(itertools.product(*axes.values())):
        rows[combination(dict(zip(axes, values, strict=True)))] = row(0.3 + 0.05 * place)
    svg = figure({"over": axes, "seeds": [0, 1], "rows": rows})
    assert (
        len(drawn(svg, "line")) == 2 * 2 and len(drawn(svg, "reference")) == 2
    )  # a curve and its mark in the legend
    assert len(drawn(svg, "point")) == len(drawn(svg, "errorbar")) == 8 and len(drawn(svg, "seed")) == 16
    style = chart_css()
    assert all(f"svg .{kind}" in style for kind in ("line", "reference", "point", "errorbar", "seed"))
    assert (
        "num samples = 16, template = none" in svg and "2 seeds; bars: 95 % intervals over questions" in svg
    )
    # A higher value stands higher, and its error bar spans its interval.
    first, last = drawn(svg, "point")[0], drawn(svg, "point")[3]
    assert float(first.get("cy")) > float(last.get("cy"))
    low, high = map(float, re.findall(r"[,V]([0-9.]+)", drawn(svg, "errorbar")[0].get("d"))[:2])
    assert high < float(first.get("cy")) < low and low - float(first.get("cy")) == pytest.approx(
        float(first.get("cy")) - high, abs=0.2
    )


def test_a_base_that_the_sweep_changes_is_not_drawn() -> None:
    rows = {"base": row(0.2), "temperature=0.5": row(0.4), "temperature=1": row(0.5, base=0.3)}
    svg = figure({"over": {"rollout.temperature": ["0.5", "1"]}, "seeds": [0], "rows": rows})
    assert not drawn(svg, "reference") and len(drawn(svg, "point")) == 2


def test_names_are_not_joined_and_text_is_escaped() -> None:
    line = SweptLine("", [SweptPoint("<b>", 0.5, 0.4, 0.6), SweptPoint("b", float("nan"), 0.1, 0.2)])
    svg = swept_chart([line], ["<b>", "b"], name='a "name"', x_label="<x>")
    assert not drawn(svg, "line") and len(drawn(svg, "point")) == 1 and "<b>" not in svg
    assert (
        swept_chart([SweptLine("", [])], ["1"], name="n", x_label="x")
        == '<p class="empty">nothing was recorded</p>'
    )
