"""The report: charts and markup against what they were given, hostile text kept text, sizes bounded, outcomes
true."""

import html.parser
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlsc_mcore.commands.report import run_report
from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.records import QuestionRecord
from rlsc_mcore.observability.memory_pools import BORDERS, POOLS
from rlsc_mcore.observability.mismatch import GAPS, LIMITS
from rlsc_mcore.reports.axes import round_ticks, short_number
from rlsc_mcore.reports.charts import Dot, Line, dot_chart, line_chart, stacked_bars
from rlsc_mcore.reports.math_markup import _ELEMENTS, render_text, to_mathml
from rlsc_mcore.reports.memory_and_agreement import (
    STACKED,
    growth_panels,
    hand_over_panels,
    hand_over_tables,
    mismatch_panels,
)
from rlsc_mcore.reports.read import changes, question_views, read_run
from rlsc_mcore.reports.standalone import standalone_svg
from tests.helpers.run_folders import make_answer, make_metrics, write_run

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\\text{<img src=x onerror=alert(1)>} $\\text{<svg onload=alert(1)>}$ \\boxed{<b onclick=alert(1)>8</b>}",
    '$\\href{javascript:alert(1)}{x}$ $\\style{background:url(http://a.b/)}{x}$ $\\class{a" onload="alert(1)}{x}$',
    "</div></details></section></main><iframe src=javascript:alert(1)>",
    '"><a href=javascript:alert(1)>',
    "{{ 7 * 7 }} {% for x in range(9) %}",
    "</script><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt; $&lt;img src=x onerror=alert(1)&gt;$",
]
SAFE_TAGS = {"span", "math", "code", "em"} | _ELEMENTS


class Tags(html.parser.HTMLParser):
    """Every element and attribute of a document, as a browser would take it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def attribute(svg: str, css_class: str, name: str) -> list[float]:
    return [
        float(node.attrib[name])
        for node in ElementTree.fromstring(svg).iter()
        if css_class in node.attrib.get("class", "").split()
    ]


def test_line_chart_places_points_in_proportion() -> None:
    svg = line_chart([Line("a", [(1, 0.0), (2, 0.5), (3, None), (4, 1.0)])], name="chart", x_label="step")
    x, y = attribute(svg, "point", "cx"), attribute(svg, "point", "cy")
    assert len(x) == 3 and (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-2)
    assert (y[0] - y[1]) / (y[0] - y[2]) == pytest.approx(0.5, abs=1e-2) and y[0] > y[2]
    assert svg.count("<polyline") == 1  # the gap leaves a lone last point
    assert 'aria-label="chart: a from 0 to 1"' in svg


def test_dot_chart_shows_intervals_and_reference() -> None:
    svg = dot_chart(
        [Dot("base", 0.2, 0.1, 0.3), Dot("<b>", 0.4, -math.inf, math.inf)], name="c", reference=0.2
    )
    (reference,), dots = attribute(svg, "reference", "x1"), attribute(svg, "dot", "cx")
    assert reference == pytest.approx(dots[0], abs=0.1) and dots[1] > dots[0]
    assert len(attribute(svg, "whisker", "x1")) == 1  # an infinite interval is none
    assert "&lt;b&gt;" in svg


def test_stacked_bars_add_up() -> None:
    svg = stacked_bars(
        ["1", "2"], [("a", [1.0, 2.0]), ("b", [3.0, 0.0])], name="n", x_label="step", unit=" s"
    )
    heights = attribute(svg, "fill", "height")
    assert (
        heights[0] + heights[1] == pytest.approx(2 * heights[2], abs=0.3) and heights[3] == 0
    )  # bar by bar: 1 + 3, then 2 + 0


@pytest.mark.parametrize(
    "chart",
    [
        line_chart([], name="n", x_label="x"),
        dot_chart([], name="n"),
        stacked_bars([], [], name="n", x_label="x", unit=""),
    ],
)
def test_nothing_recorded_says_so(chart: str) -> None:
    assert chart == '<p class="empty">nothing was recorded</p>'


@example(0.0, 5e-324)
@example(1e-310, 2e-310)
@example(-2e-308, -2e-308)
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_are_even_and_span_the_data(first: float, second: float) -> None:
    low, high = sorted((first, second))
    ticks = round_ticks(low, high)
    room = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low + room and ticks[-1] >= high - room
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (12.5, "12.5"),
        (1234.4, "1234"),
        (2e-5, "2e-05"),
        (-0.5, "-0.5"),
        (3e6, "3e+06"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_standalone_svg_is_xml_with_its_style() -> None:
    svg = standalone_svg([("a < b", dot_chart([Dot("x", 1.0)], name="n"))] * 3, "caption & more")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and len([node for node in root if node.tag.endswith("svg")]) == 3
    assert "prefers-color-scheme: dark" in svg


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        ("\\frac{1}{2}", "<mfrac>"),
        ("x^2+\\sqrt{3}", "<msqrt>"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "<mtable>"),
        ("\\boxed{5}", '<mrow class="boxed">'),
        ("\\alpha\\le\\pi", "≤"),
    ],
)
def test_formulas_become_mathml(tex: str, expected: str) -> None:
    assert expected in render_text(f"so ${tex}$.")
    assert f"${tex}$" in Tags(render_text(f"so ${tex}$.")).text  # as typed, for the switch


def test_bare_boxes_are_drawn_and_prices_are_not_formulas() -> None:
    assert render_text("thus \\boxed{\\frac{8}{2}}.").count("<mfrac>") == 1
    assert render_text("it costs $5.") == "it costs $5."
    assert render_text("\\boxed{8") == "\\boxed{8"


@pytest.mark.parametrize(
    "tex", ["\\frac{" * 300, "{" * 5000, "\\frac{", "\\left(" * 100, "x" * 2000, "^", "\\begin{matrix}"]
)
def test_formulas_that_do_not_parse_stay_as_typed(tex: str) -> None:
    assert to_mathml(tex) is None
    assert tex in Tags(render_text(f"\\({tex}\\)")).text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    found = Tags(render_text(text))
    assert set(found.tags) <= SAFE_TAGS
    assert {name for name, _ in found.attributes} <= {
        "class",
        "display",
        "stretchy",
        "fence",
        "mathvariant",
        "width",
    }


@given(st.text(st.sampled_from("<>&\"'$\\{}()[]ab1 =/^_\n") | st.characters(), max_size=80))
def test_any_text_stays_text(text: str) -> None:
    found = Tags(render_text(text.replace("\r", "")))
    assert set(found.tags) <= SAFE_TAGS
    assert not [
        name for name, _ in found.attributes if name.startswith("on") or name in ("href", "src", "style")
    ]


def write_example(folder: Path, *, after: bool = True) -> Path:
    questions = [
        QuestionRecord(index, f"{HOSTILE[index % len(HOSTILE)]} {index}?", "8", "p") for index in range(14)
    ]
    before, ended = (
        [
            make_answer(
                q, f"{HOSTILE[q % len(HOSTILE)]} {s < right}", right=s < right, sample=s, temperature=t
            )
            for t, count in ((0.0, 1), (1.0, 4))
            for q in range(14)
            for right in (rights[q % 2],)
            for s in range(count)
        ]
        for rights in ((2, 3), (4, 3))
    )
    warnings = ["length collapse: <b>answers</b> average 3.0 tokens"]
    rows = [make_metrics(step, warnings=warnings if step == 2 else []) for step in range(4)]
    rollouts = [
        {"question": 0, "sample": 0, "response_ids": [1, 2], "text": "\\boxed{x}", "engine_log_prob": -1.0}
    ]
    return write_run(
        folder,
        before=before,
        after=ended if after else [],
        questions=questions,
        metrics=rows,
        rollouts=rollouts,
    )


def test_page_holds_everything_and_nothing_runs(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run")
    assert run_report([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    found = Tags(page)
    assert found.tags.count("script") == 1 and not {"img", "iframe", "link", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [
        value for name, value in found.attributes if name in ("href", "src") and not value.startswith("#")
    ]
    assert not re.search(r"https?://(?!www\.w3\.org)", page.replace("http://a.b/", ""))
    assert found.tags.count("details") == 14 + 2 and "7 * 7" in page
    assert "length collapse: &lt;b&gt;answers&lt;/b&gt;" in page and "step 3" in page
    # Half of the questions went from 2 to 4 right of 4 samples, the others stayed at 3.
    assert "Accuracy, T = 1 (boxed) rose from 0.625 to 0.875" in page and "0.625" in page
    # Every image has a name, every table a caption, every input a label.
    assert all(
        re.search(r'aria-label="[^"]+"|aria-hidden="true"', svg) for svg in re.findall(r"<svg[^>]*>", page)
    )
    assert page.count("<table") == page.count("<caption")


def test_page_of_a_run_that_has_not_ended(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", after=False)
    run_report([str(run), "--output", str(tmp_path / "a" / "b.html"), "--title", "<i>"])
    page = (tmp_path / "a" / "b.html").read_text(encoding="utf-8")
    assert "Not evaluated after training yet: 4 of 20 steps" in page and "<title>&lt;i&gt;</title>" in page
    empty = write_run(tmp_path / "empty")
    run_report([str(empty)])
    assert "0 of 20 steps" in (empty / "report.html").read_text(encoding="utf-8")


def test_several_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_example(tmp_path / name / "run") for name in ("a", "b")]
    run_report([*map(str, runs), "--output", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "a/run" in page and "b/run" in page and "2 runs compared" in page


def test_page_stays_small_however_much_was_sampled(tmp_path: Path) -> None:
    questions = [QuestionRecord(index, "q", "8", "p") for index in range(400)]
    answers = [
        make_answer(q, f"{q} {s} " + "so $x^2$ <" * 900, right=True, sample=s)
        for q in range(400)
        for s in range(2)
    ]
    run = write_run(
        tmp_path / "run", before=answers, after=answers, questions=questions, metrics=[make_metrics(0)]
    )
    run_report([str(run)])
    assert (run / "report.html").stat().st_size < 3_000_000
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "less changed questions are left out" in page and "characters left out" in page


def test_questions_that_changed_most_come_first() -> None:
    before = [
        make_answer(0, "a", right=True),
        make_answer(1, "a", right=False),
        make_answer(2, "a", right=True),
    ]
    after = [
        make_answer(0, "b", right=True),
        make_answer(1, "a", right=True),
        make_answer(2, "a", right=True),
    ]
    views = question_views(before, after, {1: "one"})
    assert [(view.index, view.moved) for view in views] == [(1, 1.0), (0, 0.0), (2, 0.0)]
    assert views[0].text == "one" and (views[0].right_before, views[0].right_after) == (0.0, 1.0)
    assert views[1].samplings[0].after[0].is_only_here and not views[2].samplings[0].after[0].is_only_here


def test_changes_are_paired_and_named() -> None:
    before = [make_answer(q, "a", right=q < 2) for q in range(4)]
    after = [make_answer(q, "a", right=q < 3) for q in range(4)]
    found = {change.name: change for change in changes(before, after, (1.0,))}
    accuracy = found["accuracy_t1"]
    assert (accuracy.before, accuracy.after, accuracy.difference, accuracy.p_value) == (0.5, 0.75, 0.25, 1.0)
    assert found["confidence_f"].before == pytest.approx(math.exp(-0.5)) and "greedy" not in found


def test_rollouts_give_accuracy_and_entropy(tmp_path: Path) -> None:
    from rlsc_mcore.data.questions import read_questions

    gold = read_questions("embedded:train")[0].answer
    rows = [
        {
            "question": 0,
            "sample": s,
            "response_ids": [1, 2, 3],
            "text": f"\\boxed{{{answer}}}",
            "engine_log_prob": -1.5,
        }
        for s, answer in enumerate((gold, "no", gold, gold))
    ]
    run = read_run(write_run(tmp_path / "run", rollouts=rows))
    assert [(step.step, step.accuracy, step.entropy) for step in run.steps] == [(0, 0.75, 0.5)]


def test_a_comparison_is_shown_with_its_runs(tmp_path: Path) -> None:
    for name in ("rlsc_seed0", "rlsc_seed1", "entropy_seed0"):
        write_example(tmp_path / name)
    (tmp_path / "logs").mkdir()
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = {name: {"accuracy_t1": score} for name in ("base", "<b>rlsc</b>")}
    (tmp_path / "comparison.json").write_text(
        json.dumps({"questions": 14, "seeds": [0, 1], "rows": rows}), encoding="utf-8"
    )
    run_report([str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Comparison over seeds 0, 1" in page and "2 runs compared" in page and "rlsc_seed1" not in page
    assert "&lt;b&gt;rlsc&lt;/b&gt;" in page and "<b>rlsc</b>" not in page
    (tmp_path / "empty" / "logs").mkdir(parents=True)
    with pytest.raises(ConfigError, match="none of its runs has begun"):
        run_report([str(tmp_path / "empty")])


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_static_figures(tmp_path: Path, kind: str) -> None:
    if kind == "png":
        pytest.importorskip("matplotlib")
    run = write_example(tmp_path / "run")
    run_report([str(run), "--format", kind])
    content = (run / f"report.{kind}").read_bytes()
    assert (
        content.startswith(b"\x89PNG")
        if kind == "png"
        else ElementTree.fromstring(content).tag.endswith("svg")
    )
    assert len(content) > 10_000


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run there; expected"):
        run_report([str(tmp_path)])
    run = write_example(tmp_path / "run")
    file = run / "evaluation" / "after.answers.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 71: malformed JSON"):
        run_report([str(run)])
    (run / "evaluation" / "after.answers.jsonl").unlink()
    (run / "summary.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"summary\.json: malformed JSON"):
        run_report([str(run)])
    (run / "summary.json").write_text(json.dumps({"versions": {"torch": "2"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="--output"):
        run_report([str(run), "--output", str(run / "config.yaml" / "x.html")])


def test_the_memory_hand_over_is_drawn_and_written(tmp_path: Path) -> None:
    run = read_run(write_example(tmp_path / "run"))
    (chart,) = hand_over_panels([run])
    heights = attribute(chart.svg, "fill", "height")
    bars = [heights[8 * i : 8 * i + 8] for i in range(5)]  # rollout, sleep, train, release, swap
    total = [sum(bar) for bar in bars]
    assert chart.legend == tuple(STACKED) and len(heights) == 40
    assert total[0] == pytest.approx(2 * total[1], rel=0.01) and total[2] == pytest.approx(
        70 / 80 * total[0], rel=0.01
    )  # 80, 40, 70 GiB
    assert (
        bars[0][4] == pytest.approx(total[0] / 2, rel=0.01)
        and bars[1][4] == 0 == bars[3][6]
        and bars[2][6] > 0
    )
    (table,) = hand_over_tables([run])
    assert table.caption.startswith("run, step 4, in GiB") and [
        border for border, _, _ in table.rows
    ] == list(BORDERS)
    cells = {border: dict(zip(POOLS, row, strict=True)) for border, _, row in table.rows}
    assert (
        cells["train"]["activations_cached"] == "30.00"
        and cells["release"]["free"] == "100.00"
        and cells["sleep"]["kv_cache"] == "0.00"
    )
    page = Path(tmp_path / "run.html")
    run_report([str(tmp_path / "run"), "--output", str(page)])
    text = page.read_text(encoding="utf-8")
    assert (
        'id="memory-title"' in text
        and '<th scope="col" title="keys and values">kv cache</th>' in text
        and "<td>100.00</td>" in text
    )


def test_a_cpus_table_says_what_it_cannot_know(tmp_path: Path) -> None:
    host = {
        border: dict.fromkeys(POOLS) | {"weights": 3 << 20, "other": 900 << 20, "free": 50 << 30}
        for border in BORDERS
    }
    run = read_run(write_run(tmp_path / "run", metrics=[make_metrics(0), make_metrics(1, memory=host)]))
    (table,) = hand_over_tables([run])
    assert "step 2, in MiB" in table.caption
    assert (
        dict(zip(POOLS, table.rows[0][2], strict=True))["cuda_graphs"] == "n/a"
        and "900.00" in table.rows[0][2]
    )
    (chart,) = hand_over_panels([run])
    assert chart.legend == ("weights", "other")  # nothing is drawn for what was not measured
    assert len(growth_panels([run])) == 2
    old = read_run(write_run(tmp_path / "old", metrics=[make_metrics(0, memory={})]))
    assert hand_over_panels([old]) == hand_over_tables([old]) == growth_panels([old]) == []


def test_agreement_is_drawn_with_its_limits(tmp_path: Path) -> None:
    runs = [
        read_run(
            write_run(tmp_path / d, metrics=[make_metrics(0), make_metrics(1)], flags=["--model.dtype", d])
        )
        for d in LIMITS
    ]
    panels = mismatch_panels(runs)
    assert [panel.title for panel in panels] == [
        "mean",
        "99th percentile",
        "largest",
        "per answer, mean",
        "per answer, largest",
    ]
    assert panels[0].help.endswith("Warning above 0.1 in bfloat16, 3e-05 in float32.")
    assert "3e-06" in panels[2].svg and "3.1e-06 nats" in panels[2].svg
    nucleus = make_metrics(0, **dict.fromkeys(GAPS))
    assert (
        mismatch_panels([read_run(write_run(tmp_path / "nucleus", metrics=[nucleus]))]) == []
    )  # not comparable
