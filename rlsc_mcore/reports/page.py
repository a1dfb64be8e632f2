"""Render a report as one HTML file that needs no network, no server and no script."""

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from rlsc_mcore.evaluation.scores import key_temperature
from rlsc_mcore.reports.charts import Dot, dot_chart
from rlsc_mcore.reports.contents import AnswerGroup, Change, QuestionView, RunView
from rlsc_mcore.reports.curves import (
    calibration_panels,
    gpu_panels,
    memory_panels,
    metric_panels,
    phase_panels,
)
from rlsc_mcore.reports.math_markup import render_text
from rlsc_mcore.reports.memory_and_agreement import (
    growth_panels,
    hand_over_panels,
    hand_over_tables,
    mismatch_panels,
)
from rlsc_mcore.reports.standalone import chart_css

MOST_PAGE_BYTES = 2_800_000  # the answers use the bytes that charts and tables leave
FEWEST_ANSWER_BYTES = 200_000
LONGEST_ANSWER = 6000  # characters of an answer that are shown, half from each end


def render_page(
    runs: Sequence[RunView], *, title: str, version: str, figures: Sequence[tuple[str, str]] = ()
) -> str:
    """Return the report as HTML; all text from models and files is escaped.

    `figures` are (heading, SVG) pairs drawn by this package and are not escaped.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=_percent, signed=_signed, score=_score, p_value=_p_value, number=_number
    )
    script = _asset("report.js")
    sections = [
        ("curves", "Curves, step by step", _markup(metric_panels(runs))),
        (
            "calibration",
            "Calibration, is a confident answer right more often?",
            _markup(calibration_panels(runs)),
        ),
        ("time", "Where the time went, in seconds", _markup(phase_panels(runs))),
        ("agreement", "Trainer against engine, in nats", _markup(mismatch_panels(runs))),
        ("memory", "Memory at each phase boundary", _markup(hand_over_panels(runs))),
        ("growth", "Memory, step by step", _markup([*growth_panels(runs), *memory_panels(runs)])),
        ("gpu", "GPU", _markup(gpu_panels(runs))),
    ]
    charts = sum(len(str(panel["svg"])) for _, _, panels in sections for panel in panels) + sum(
        len(svg) for _, svg in figures
    )
    tables = 1000 * sum(len(run.metrics) + 40 for run in runs)
    budget = max(FEWEST_ANSWER_BYTES, MOST_PAGE_BYTES - charts - tables)
    browsers = [(run, *_browser(run, budget // len(runs), environment)) for run in runs if run.questions]
    return environment.from_string(_asset("report.html.jinja")).render(
        runs=runs,
        title=title,
        version=version,
        style=Markup(chart_css() + _asset("report.css")),  # trusted: files of this package
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        outcomes=[outcome(run) for run in runs],
        change_charts=[Markup(_change_chart(run)) for run in runs],  # labels are escaped in the chart
        sections=sections,
        memory_tables=hand_over_tables(runs),
        browsers=browsers,
        figures=[(heading, Markup(svg)) for heading, svg in figures],  # trusted: drawn by this package
        score_names=_score_names(runs),
    )


def outcome(run: RunView) -> list[str]:
    """Return sentences that summarize the changes, with intervals, and the part of a gain that is
    formatting."""
    by_name = {change.name: change for change in run.changes if change.difference is not None}
    if not by_name:
        return [
            f"Not evaluated after training yet: {len(run.metrics)} of {run.planned_steps} steps are recorded."
        ]
    sampled = [change for name, change in by_name.items() if name.startswith("accuracy_t")]
    sentences = [_say(change) for change in [*sampled, *([by_name["greedy"]] if "greedy" in by_name else [])]]
    boxed = max(sampled, key=lambda change: change.difference or 0.0, default=None)
    lenient = by_name.get(boxed.name.replace("accuracy", "lenient")) if boxed is not None else None
    if boxed is not None and lenient is not None and boxed.is_clear and (boxed.difference or 0) > 0:
        share = 1 - (lenient.difference or 0.0) / (boxed.difference or 1.0)
        if share > 0.1:
            sentences.append(
                f"About {_percent(min(1.0, share))} of the gain at T = {key_temperature(boxed.name):g} is "
                "formatting: "
                "where the last number of an unboxed answer counts too, the gain is "
                f"{_signed(lenient.difference)}."
            )
    spread = by_name.get("distinct_share")
    if spread is not None and spread.is_clear and (spread.difference or 0) < 0:
        sentences.append(
            f"Diversity fell: {_percent(spread.before)} of the answers were distinct, now "
            f"{_percent(spread.after)}."
        )
    return sentences


def _say(change: Change) -> str:
    numbers = f"{_score(change.before, change)} to {_score(change.after, change)}"
    if change.low is None or change.high is None or not math.isfinite(change.low):
        return f"{change.label}: {numbers}."
    interval = f"{_signed(change.difference)}, 95 % interval {_signed(change.low)} to {_signed(change.high)}, {_p_value(change.p_value)}"
    if not change.is_clear:
        return f"{change.label} did not change clearly: {numbers} ({interval})."
    return f"{change.label} {'rose' if (change.difference or 0) > 0 else 'fell'} from {numbers} ({interval})."


def _change_chart(run: RunView) -> str:
    dots = []
    for change in run.changes:
        if change.difference is not None and change.name.startswith(
            ("accuracy", "greedy", "lenient", "boxed")
        ):
            clear = 2 if (change.difference or 0) > 0 else 4
            dots.append(
                Dot(
                    change.label,
                    change.difference,
                    change.low,
                    change.high,
                    clear if change.is_clear else 5,
                    not change.is_clear,
                )
            )
    return (
        dot_chart(
            dots, name=f"change after training, {run.name}", reference=0.0, width=400, labels_above=True
        )
        if dots
        else ""
    )


def _browser(run: RunView, budget: int, environment: jinja2.Environment) -> tuple[list[Markup], int]:
    """Render questions in order until `budget` bytes are used; return them and the number of questions left
    out."""
    template = environment.from_string(_asset("question.html.jinja"))
    rendered: list[Markup] = []
    used = 0
    for question in run.questions:
        text = template.render(
            question=question, render=_render_answer, confidence=_confidence, search=_search_text(question)
        )
        used += len(text.encode("utf-8", "replace"))
        if used > budget and rendered:
            break
        rendered.append(Markup(text))  # rendered with autoescape
    return rendered, len(run.questions) - len(rendered)


def _render_answer(text: str) -> Markup:
    if len(text) > LONGEST_ANSWER:
        half = LONGEST_ANSWER // 2
        cut = f"\n[{len(text) - LONGEST_ANSWER} characters left out]\n"
        return (
            Markup(render_text(text[:half]))
            + Markup("<em>")
            + cut
            + Markup("</em>")
            + Markup(render_text(text[-half:]))
        )
    return Markup(render_text(text))  # `render_text` escapes the text


def _confidence(group: AnswerGroup) -> float | None:
    return None if group.log_prob is None else math.exp(min(0.0, group.log_prob))


def _search_text(question: QuestionView) -> str:
    return f"{question.index} {question.text} {question.gold}".lower()[:300]


def _markup(panels: Sequence[object]) -> list[dict[str, object]]:
    return [{**vars(panel), "svg": Markup(getattr(panel, "svg"))} for panel in panels]  # noqa: B009


def _score_names(runs: Sequence[RunView]) -> list[str]:
    return list(dict.fromkeys(change.name for run in runs for change in run.changes))


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _score(value: float | None, change: Change) -> str:
    return "–" if value is None else f"{value:.{change.digits}f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _p_value(value: float | None) -> str:
    return (
        ""
        if value is None
        else "p < 0.001"
        if value < 0.001
        else f"p = {value:.3f}"
        if value < 0.1
        else f"p = {value:.2f}"
    )
