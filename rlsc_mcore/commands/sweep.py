"""`rlsc sweep`: train a grid of settings and compare them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import ConfigError
from rlsc_mcore.experiments.compare import markdown, parse_seeds
from rlsc_mcore.experiments.runs import Experiment, check_flags, grid, run_settings
from rlsc_mcore.experiments.sweep import figure, gather, print_table
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.run.files import to_json, write_atomically

DESCRIPTION = """Train every combination of the swept values and compare what came out.

  rlsc sweep --config FILE --over algorithm.alpha=0,0.01,0.1,1 --over rollout.num_samples=4,16,64

A sweep that was stopped goes on with the same command.
Every other option is one of `rlsc train` and holds for all runs."""


def run_sweep(arguments: Sequence[str]) -> int:
    """Run `rlsc sweep` and return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="configuration file of every run")
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="FIELD=VALUE,VALUE,...",
        help="a field and its values",
    )
    parser.add_argument("--seeds", default="0", help="seeds of every combination")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/sweep"),
        help="folder of the runs and of sweep.json, .svg and .md",
    )
    known, flags = parser.parse_known_args(arguments)
    axes = _axes(known.over)
    variants = grid(axes)
    experiment = Experiment(known.config, tuple(flags), parse_seeds(known.seeds), known.output)
    configs = [
        experiment.config(variant, experiment.seeds[0]) for variant in variants
    ]  # an invalid value raises before the first run starts
    check_flags(flags)
    if configs[0].evaluation.path is None:
        raise ConfigError("evaluation.path: a sweep needs questions to evaluate on")
    report = Reporter(enabled=True)
    with experiment.owned("sweep.json"):
        experiment.run(variants, report)
        temperatures = [
            t
            for t in configs[0].evaluation.temperatures
            if all(t in config.evaluation.temperatures for config in configs)
        ]
        result = gather(experiment, variants, axes, temperatures) | run_settings(experiment, variants[0])
        write_atomically(known.output / "sweep.json", to_json(result, indent=1) + "\n")
        write_atomically(known.output / "sweep.svg", figure(result))
        write_atomically(known.output / "sweep.md", markdown(result))
    print_table(result, report.console)
    report.line(f"wrote {known.output}/sweep.json, .svg and .md")
    return 0


def _axes(texts: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for text in texts:
        field, separator, values = text.partition("=")
        parts = [value.strip() for value in values.split(",")]
        if not separator or not field or not all(parts) or len(set(parts)) != len(parts):
            raise ConfigError(f"--over {text}: expected FIELD=VALUE,VALUE,... with different values")
        if field in axes:
            raise ConfigError(f"--over {text}: {field} is swept already")
        if field in ("run_dir", "training.seed"):
            raise ConfigError(
                f"--over {text}: {field} is set by the sweep itself"
                + ("; use --seeds" if field == "training.seed" else "")
            )
        axes[field] = parts
    return axes
