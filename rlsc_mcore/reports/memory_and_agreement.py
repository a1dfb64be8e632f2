"""Draw the memory by owner at each phase boundary, and the log-prob gap between trainer and engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsc_mcore.observability.memory_pools import BORDERS, POOLS, RESIDUE_BORDERS
from rlsc_mcore.observability.mismatch import LIMITS
from rlsc_mcore.reports.charts import Line, line_chart, stacked_bars
from rlsc_mcore.reports.contents import RunView
from rlsc_mcore.reports.curves import Panel

# Series of the stacked bars, from the bottom; pools of one series share a colour.
STACKED = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "engine's own": ("engine_weights", "cuda_graphs"),
    "KV cache": ("kv_cache",),
    "workspace": ("workspace",),
    "cached": ("activations_cached",),
    "other": ("other",),
}
GAP_PANELS = {
    "log_prob_gap_mean": ("mean", "Mean |difference of log p| per sampled token.", "mean"),
    "log_prob_gap_p99": ("99th percentile", "One token in a hundred differs by more.", "p99"),
    "log_prob_gap_max": ("largest", "The token that differs most.", "largest"),
    "log_prob_gap_sequence_mean": (
        "per answer, mean",
        "Mean |sum of differences| over an answer: rounding cancels, a bias adds up.",
        None,
    ),
    "log_prob_gap_sequence_max": (
        "per answer, largest",
        "The answer whose probability differs most, in nats.",
        None,
    ),
}


@dataclass(frozen=True)
class MemoryTable:
    """Memory in the last step of a run as text: one row per phase boundary, one column per pool."""

    caption: str
    columns: Sequence[tuple[str, str]]  # (label, description)
    rows: Sequence[tuple[str, str, Sequence[str]]]  # (phase boundary, description, cells)


def hand_over_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw the pools as stacked bars at each phase boundary of the last step, one chart per run."""
    panels = []
    for run, step, table in _last_tables(runs):
        size, unit = _unit(table)
        shown = {
            name: pools
            for name, pools in STACKED.items()
            if any(table[b].get(p) is not None for b in table for p in pools)
        }
        series = [
            (name, [sum(table[b].get(p) or 0 for p in pools) / size for b in table])
            for name, pools in shown.items()
        ]
        svg = stacked_bars(
            list(table),
            series,
            name=f"memory at the borders of step {step} of {run.name}",
            x_label="after",
            unit=f" {unit}",
        )
        text = (
            f"Step {step}, in {unit}: "
            + ", ".join(f"{border} ({BORDERS.get(border, border)})" for border in table)
            + "."
        )
        panels.append(Panel(run.name, text, svg, tuple(shown)))
    return panels


def hand_over_tables(runs: Sequence[RunView]) -> list[MemoryTable]:
    """Return the same data as tables with every pool; n/a if the device has no such pool."""
    tables = []
    for run, step, table in _last_tables(runs):
        size, unit = _unit(table)
        rows = [
            (border, BORDERS.get(border, ""), [_cell(pools.get(pool), size) for pool in POOLS])
            for border, pools in table.items()
        ]
        caption = f"{run.name}, step {step}, in {unit} after each phase: the fullest data-parallel rank; n/a: no such pool on this device"
        tables.append(
            MemoryTable(caption, [(name.replace("_", " "), text) for name, text in POOLS.items()], rows)
        )
    return tables


def growth_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw the pools over the steps at each of `RESIDUE_BORDERS`; a line that keeps rising shows a memory
    leak."""
    panels = []
    for run in runs:
        for border in RESIDUE_BORDERS:
            rows = [(row["step"] + 1, row.get("memory", {}).get(border, {})) for row in run.metrics]
            names = [pool for pool in POOLS if pool != "free" and any(pools.get(pool) for _, pools in rows)]
            lines = [
                Line(name.replace("_", " "), [(step, _gib(pools.get(name))) for step, pools in rows], i, i)
                for i, name in enumerate(names)
            ]
            svg = line_chart(lines, name=f"memory after {border} of {run.name}", x_label="step", unit=" GiB")
            title = f"after {border}" if len(runs) == 1 else f"{run.name}, after {border}"
            panels.append(
                Panel(title, f"In GiB, when {BORDERS[border]}.", svg, tuple(line.name for line in lines))
            )
    return [panel for panel in panels if panel.svg.startswith("<svg")]


def mismatch_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Draw the log-prob gap between trainer and engine; the text states the warning limits of the data
    types."""
    panels = []
    dtypes = sorted({run.dtype for run in runs})
    for key, (title, text, limit) in GAP_PANELS.items():
        lines = [
            Line(run.name, [(row["step"] + 1, row.get(key)) for row in run.metrics], i, i)
            for i, run in enumerate(runs)
        ]
        svg = line_chart(lines, name=f"trainer against engine, {title}", x_label="step", unit=" nats")
        if limit is not None:
            text += (
                " Warning above "
                + ", ".join(f"{getattr(LIMITS[dtype], limit):g} in {dtype}" for dtype in dtypes)
                + "."
            )
        panels.append(Panel(title, text, svg))
    return [panel for panel in panels if panel.svg.startswith("<svg")]


def _last_tables(runs: Sequence[RunView]) -> Iterator[tuple[RunView, int, Mapping[str, Mapping[str, Any]]]]:
    """Yield (run, step counted from 1, table) of each run's last step that has a memory table."""
    for run in runs:
        row = next((row for row in reversed(run.metrics) if row.get("memory")), None)
        if row is not None:
            yield run, int(row["step"]) + 1, row["memory"]


def _unit(table: Mapping[str, Mapping[str, Any]]) -> tuple[int, str]:
    largest = max(
        (size or 0 for pools in table.values() for pool, size in pools.items() if pool != "free"), default=0
    )
    return (1 << 30, "GiB") if largest >= 4 << 30 else (1 << 20, "MiB")


def _cell(size: int | None, unit: int) -> str:
    return "n/a" if size is None else f"{size / unit:,.2f}"


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30
