"""`rlsc report`: write a report page or figure of one or more runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import rlsc_mcore
from rlsc_mcore.config import ConfigError
from rlsc_mcore.experiments import compare, sweep
from rlsc_mcore.reports.contents import RunView
from rlsc_mcore.reports.read import _read_json, read_run
from rlsc_mcore.run.files import write_atomically
from rlsc_mcore.run.folder import CONFIG_FILE
from rlsc_mcore.run.made_here import FILE_MARK as MARKER

FORMATS = ("html", "png", "svg")


def run_report(arguments: Sequence[str]) -> int:
    """Run `rlsc report` and return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc report", description="Write one self-contained page about one run or several."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, of a comparison or of a sweep"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write (default: report.html, .png or .svg in the first run's folder)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="html",
        help="html: the whole report; png, svg: its curves as a figure",
    )
    parser.add_argument("--title", help="heading of the page")
    known = parser.parse_args(arguments)
    figures = [figure for folder in known.runs for figure in _figures(folder)]
    runs = _told_apart([read_run(run) for folder in known.runs for run in _run_folders(folder)])
    output = known.output or known.runs[0] / f"report.{known.format}"
    title = known.title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    if not runs:
        raise ConfigError(f"{known.runs[0]}: none of its runs has begun")
    if output.exists() and not _is_report(output):
        raise ConfigError(
            f"--output {output}: exists and is no report of this program; it is left alone: choose another "
            "file"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if known.format == "png":
            from rlsc_mcore.reports.png import write_png

            write_png(runs, output, title)
        else:
            write_atomically(output, _render(runs, known.format, title, figures) + f"<!-- {MARKER} -->\n")
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot write: {error.strerror}") from None
    print(f"wrote {output}")
    return 0


def _is_report(file: Path) -> bool:
    """Return whether a file has the marker of this program's reports and figures near its start or end."""
    try:
        with file.open("rb") as content:
            head = content.read(1 << 16)
            content.seek(max(0, file.stat().st_size - 4096))
            return MARKER.encode() in head + content.read()
    except OSError:
        return False


def _run_folders(folder: Path) -> list[Path]:
    """Return the run folders of `folder`: itself, or the first seed's runs of a comparison or sweep."""
    if (folder / CONFIG_FILE).is_file() or not (folder / "logs").is_dir():
        return [folder]
    seeds = sorted(
        {
            int(path.name.rpartition("_seed")[2])
            for path in folder.glob("*_seed*")
            if path.name.rpartition("_seed")[2].isdigit()
        }
    )
    return (
        sorted(path for path in folder.glob(f"*_seed{seeds[0]}") if (path / CONFIG_FILE).is_file())
        if seeds
        else []
    )


def _figures(folder: Path) -> list[tuple[str, str]]:
    """Return (heading, SVG) of a finished comparison or sweep, drawn from its JSON file."""
    found = []
    for name, draw in (("comparison", compare.figure), ("sweep", sweep.figure)):
        result = _read_json(folder / f"{name}.json")
        if result:
            seeds = ", ".join(map(str, result["seeds"]))
            found.append(
                (
                    f"{name.capitalize()} over seeds {seeds}; the runs below are those of the first",
                    draw(result),
                )
            )
    return found


def _render(runs: Sequence[RunView], kind: str, title: str, figures: Sequence[tuple[str, str]]) -> str:
    if kind == "svg":
        from rlsc_mcore.reports.curves import metric_panels
        from rlsc_mcore.reports.standalone import standalone_svg

        return standalone_svg([(panel.title, panel.svg) for panel in metric_panels(runs)], title)
    from rlsc_mcore.reports.page import render_page

    return render_page(runs, title=title, version=rlsc_mcore.__version__, figures=figures)


def _told_apart(runs: Sequence[RunView]) -> list[RunView]:
    """Prefix the names of runs with equal folder names by the parent folder's name."""
    names = [run.name for run in runs]
    return [
        RunView(**{**vars(run), "name": f"{Path(run.folder).resolve().parent.name}/{run.name}"})
        if names.count(run.name) > 1
        else run
        for run in runs
    ]
