"""Draw the curves as a static figure with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.reports.contents import RunView
from rlsc_mcore.reports.curves import CURVES, curve_band, curve_points
from rlsc_mcore.run.made_here import FILE_MARK

_SHOWN = 8  # number of curves from metrics.jsonl, in addition to accuracy and entropy
_COLUMNS = 2


def write_png(runs: Sequence[RunView], file: Path, title: str) -> None:
    """Write a figure with accuracy, entropy and the first curves of metrics.jsonl.

    Raises ConfigError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "--format png: needs matplotlib (pip install matplotlib); svg and html need nothing"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = (_SHOWN + 2) // _COLUMNS
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(11, 2.5 * rows), layout="constrained")
    panels = list(axes.flat)
    for axis, name in zip(panels[:2], ("accuracy", "entropy"), strict=True):
        for run in runs:
            points = [(step.step + 1, getattr(step, name)) for step in run.steps]
            axis.plot(*_columns(points), marker="o", markersize=3, label=run.name)
        axis.set_title(
            {"accuracy": "accuracy of the sampled answers", "entropy": "entropy, nats per token"}[name],
            fontsize=10,
        )
    shown = list(CURVES.items())[:_SHOWN]
    for axis, (name, curve) in zip(panels[2:], shown, strict=True):
        for run in runs:
            axis.plot(
                *_columns(curve_points(run.metrics, name, curve.path)),
                marker="o",
                markersize=3,
                label=run.name,
            )
            band = curve_band(run.metrics, name, curve)
            if band:
                x, low, high = zip(*band, strict=True)
                axis.fill_between(x, low, high, alpha=0.15)
        axis.set_title(curve.label, fontsize=10)
    for axis in panels:
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.set_xlabel("step", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        panels[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=130, metadata={"Software": FILE_MARK})
    pyplot.close(figure)


def _columns(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in points if y is not None]
    return [x for x, _ in kept], [y for _, y in kept]
