"""Draw a result file as a roofline: operations per second over operations per byte, with the ceilings of the
same run."""

import json
import sys
from pathlib import Path
from typing import Any


def draw(path: Path) -> list[Path]:
    """Write <result>.png and <result>.svg beside a result file and return their paths; write nothing if
    matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlsc"  # makes the file reproducible
    from matplotlib import pyplot

    content = json.loads(path.read_text(encoding="utf-8"))
    points = [row for row in content["rows"] if row["timing"] and row["bytes_moved"] and row["flops"]]
    if not points:
        return []
    ceilings = content["ceilings"]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    _ceilings(axes, points, ceilings)
    markers = "osD^v<>Pxh*"
    providers = sorted({row["provider"] for row in points})
    for index, provider in enumerate(providers):
        mine = [row for row in points if row["provider"] == provider]
        x = [row["flops"] / row["bytes_moved"] for row in mine]
        y = [row["flops"] / (row["timing"]["median_ms"] * 1e-3) for row in mine]
        axes.scatter(x, y, marker=markers[index % len(markers)], label=provider, alpha=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte moved at least",
        ylabel="operations per second",
        title=path.stem,
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(visible=True, which="both", alpha=0.2)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        figure.savefig(
            target, dpi=110, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None
        )
    pyplot.close(figure)
    return written


def _ceilings(axes: Any, points: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
    """Draw the line of the copy bandwidth up to the rate of the matrix product."""
    intensity = [row["flops"] / row["bytes_moved"] for row in points]
    ridge = ceilings["matmul_flops_per_s"] / ceilings["copy_bytes_per_s"]
    low, high = min(*intensity, ridge) / 3, max(*intensity, ridge) * 3
    axes.plot(
        [low, ridge, high],
        [low * ceilings["copy_bytes_per_s"], *[ceilings["matmul_flops_per_s"]] * 2],
        color="black",
        linewidth=1.2,
    )
    axes.annotate("copy bandwidth", (low * 1.1, low * 1.3 * ceilings["copy_bytes_per_s"]), fontsize="small")
    axes.annotate("matrix product", (ridge, ceilings["matmul_flops_per_s"] * 1.1), fontsize="small")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*draw(Path(name)))
