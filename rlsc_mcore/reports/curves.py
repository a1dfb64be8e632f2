"""Draw the curves of a report from the metrics of the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsc_mcore.observability.step_metrics import DESCRIPTIONS, Description, read_number
from rlsc_mcore.reports.charts import Line, line_chart, stacked_bars
from rlsc_mcore.reports.contents import Calibration, RunView


@dataclass(frozen=True)
class Panel:
    """A drawn chart."""

    title: str
    help: str
    svg: str
    legend: tuple[str, ...] = ()  # names of stacked series, in the order of the colours


CURVES = {name: description for name, description in DESCRIPTIONS.items() if description.is_curve}


def metric_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw one chart per metric that has values, with all runs in it."""
    panels = [
        _derived(
            "accuracy of the sampled answers",
            "Graded after the fact; training never saw a label (but rlvr).",
            runs,
            "accuracy",
        ),
        _derived(
            "entropy",
            "Mean -log p per sampled token, in nats: an estimate of the policy's entropy.",
            runs,
            "entropy",
        ),
    ]
    for name, curve in CURVES.items():
        lines = [_line(run, index, name, curve) for index, run in enumerate(runs)]
        panels.append(_panel(curve.label, curve.help, lines, curve.unit))
    return [panel for panel in panels if panel.svg.startswith("<svg")]


def phase_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw the seconds per phase of each step, one chart per run."""
    panels = []
    for run in runs:
        names = list(dict.fromkeys(name for row in run.metrics for name in row.get("seconds", {})))
        series = [
            (name, [float(row.get("seconds", {}).get(name, 0.0)) for row in run.metrics]) for name in names
        ]
        labels = [str(int(row["step"]) + 1) for row in run.metrics]
        if labels and series:
            svg = stacked_bars(
                labels, series, name=f"seconds per phase of {run.name}", x_label="step", unit=" s"
            )
            panels.append(Panel(run.name, "", svg, tuple(names)))
    return panels


def calibration_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw the reliability curves before and after training, one chart per run."""
    panels = []
    for run in runs:
        shown = run.calibrations
        lines = [
            Line(f"{part.side}, right", [(x, right) for x, _, right in part.curve], i)
            for i, part in enumerate(shown)
        ]
        lines += [
            Line(
                f"{part.side}, p(y|x)",
                [(x, confidence) for x, confidence, _ in part.curve],
                len(shown) + i,
                2,
            )
            for i, part in enumerate(shown)
        ]
        if shown:
            text = (
                f"Answers at T = {shown[0].temperature:g} in tenths, least confident first: the share of "
                "right (boxed) ones, and the "
                f"model's own mean probability of the whole answer. AUROC: "
                + "; ".join(_auroc(part) for part in shown)
                + ". 0.5 says nothing."
            )
            svg = line_chart(
                lines, name=f"reliability of {run.name}", x_label="% of the answers are less confident"
            )
            panels.append(Panel(run.name, text, svg, tuple(line.name for line in lines)))
    return panels


def _auroc(part: Calibration) -> str:
    if part.auroc is None:
        return f"none {part.side} (all right or all wrong)"
    within = "" if part.auroc_within is None else f" ({part.auroc_within:.2f} among answers to one question)"
    return f"{part.auroc:.2f} {part.side}{within}"


def memory_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw `memory_bytes` over the steps, one chart per run; a line that keeps rising shows a memory leak."""
    panels = []
    for run in runs:
        names = list(dict.fromkeys(name for row in run.metrics for name in row.get("memory_bytes", {})))
        lines = [
            Line(
                name.replace("_", " "),
                [(row["step"] + 1, _gib(row.get("memory_bytes", {}).get(name))) for row in run.metrics],
                i,
                i,
            )
            for i, name in enumerate(names)
        ]
        if lines:
            text = (
                ", ".join(line.name for line in lines)
                + ", in GiB. A rising staircase would be memory that is not handed back."
            )
            panels.append(_panel(run.name, text, lines, " GiB"))
    return [panel for panel in panels if panel.svg.startswith("<svg")]


def gpu_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw GPU power, utilisation, clocks and energy by phase, if NVML measured them."""
    panels = []
    readings = (
        ("power_w", "GPU power", " W"),
        ("utilization_share", "GPU utilisation", ""),
        ("sm_clock_mhz", "SM clock", " MHz"),
    )
    for key, title, unit in readings:
        lines = []
        for index, run in enumerate(runs):
            phases = list(
                dict.fromkeys(name for row in run.metrics for name in row.get("gpu", {}).get("phases", {}))
            )
            for number, phase in enumerate(phases):
                points = [
                    (row["step"] + 1, read_number(row, "gpu", "phases", phase, key)) for row in run.metrics
                ]
                name = phase if len(runs) == 1 else f"{run.name}, {phase}"
                lines.append(Line(name, points, number if len(runs) == 1 else index, number))
        panels.append(
            _panel(
                title, "Mean of each phase, from NVML: " + ", ".join(line.name for line in lines), lines, unit
            )
        )
    energy = [
        Line(
            run.name,
            [(row["step"] + 1, read_number(row, "gpu", "energy_j_per_token")) for row in run.metrics],
            i,
            i,
        )
        for i, run in enumerate(runs)
    ]
    panels.append(_panel("energy per sampled token", "Joule, over the whole step.", energy, " J"))
    return [panel for panel in panels if panel.svg.startswith("<svg")]


def _line(run: RunView, index: int, name: str, curve: Description) -> Line:
    return Line(
        run.name,
        curve_points(run.metrics, name, curve.path),
        index,
        index,
        curve_band(run.metrics, name, curve),
    )


def curve_points(
    rows: Sequence[Mapping[str, Any]], name: str, path: Sequence[str] = ()
) -> list[tuple[float, float | None]]:
    """Return (finished steps, value) of a field of metrics.jsonl; the value is None if a row has no
    number."""
    return [(row["step"] + 1, read_number(row, name, *path)) for row in rows]


def curve_band(
    rows: Sequence[Mapping[str, Any]], name: str, curve: Description
) -> list[tuple[float, float, float]]:
    """Return (finished steps, low, high) of a curve's band for the rows that have both; [] without a band."""
    if not curve.low:
        return []
    edges = [
        (row["step"] + 1, read_number(row, name, *curve.low), read_number(row, name, *curve.high))
        for row in rows
    ]
    return [(x, low, high) for x, low, high in edges if low is not None and high is not None]


def _derived(title: str, text: str, runs: Sequence[RunView], field: str) -> Panel:
    lines = [
        Line(run.name, [(step.step + 1, getattr(step, field)) for step in run.steps], i, i)
        for i, run in enumerate(runs)
    ]
    return _panel(title, text, lines, "")


def _panel(title: str, text: str, lines: Sequence[Line], unit: str) -> Panel:
    return Panel(title, text, line_chart(lines, name=title, x_label="step", unit=unit))


def _gib(value: Any) -> float | None:
    return float(value) / 2**30 if isinstance(value, (int, float)) else None
