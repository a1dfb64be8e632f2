"""`rlsc compare`: train several objectives on the same questions and seeds, and compare them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.config import LOWEST_TEMPERATURE, ConfigError
from rlsc_mcore.experiments.compare import figure, gather, markdown, parse_seeds, print_table
from rlsc_mcore.experiments.learning_rates import (
    check_validation,
    choose_rates,
    parse_rates,
    with_chosen_rates,
)
from rlsc_mcore.experiments.paired import compare_evaluations, print_pairs
from rlsc_mcore.experiments.runs import Experiment, Variant, check_flags, run_settings
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.run.files import to_json, write_atomically

# Name -> flags of each objective and of each of its variants.
VARIANTS: dict[str, tuple[str, ...]] = {
    name: (*row.flags, *flags)
    for row in OBJECTIVES.values()
    for name, flags in ({row.name: ()} | dict(row.variants)).items()
}
LOWER_TEMPERATURE = "lower_temperature"
DEFAULT_OBJECTIVES = ("rlsc", "self_sft", "majority_vote", "entropy", "rlvr", LOWER_TEMPERATURE)
ALL = "all"

DESCRIPTION = """Train and evaluate several objectives on the same questions and seeds.

A comparison that was stopped goes on with the same command.
Every other option is one of `rlsc train` and holds for all runs.
`lower_temperature` trains nothing: it is the base model, answering at `--temperature-factor` times each
temperature.

  rlsc compare --runs RUN_OR_FOLDER RUN_OR_FOLDER ...

compares finished runs (after training) or folders of `rlsc eval` in pairs, question by question, and trains
nothing."""


def run_compare(arguments: Sequence[str]) -> int:
    """Run `rlsc compare` and return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known_names = [*VARIANTS, LOWER_TEMPERATURE]
    parser.add_argument("--config", type=Path, help="configuration file of every run")
    parser.add_argument(
        "--runs", nargs="+", type=Path, help="train nothing: compare finished runs or folders of rlsc eval"
    )
    parser.add_argument(
        "--objectives",
        default=",".join(DEFAULT_OBJECTIVES),
        help=f"{ALL}, or some of {', '.join(known_names)}",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of every objective")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the runs and of comparison.json, .svg and .md (default: runs/compare)",
    )
    parser.add_argument("--temperature-factor", type=float, default=0.5, help="of lower_temperature")
    parser.add_argument(
        "--learning-rates",
        help="rates like 1e-4,5e-4,1e-3: train each objective with each, on the first seed, and compare it with "
        "the one of the best accuracy on --validation (default: optimizer.lr for all)",
    )
    parser.add_argument(
        "--validation", help="questions that choose the learning rates, such as embedded:validation"
    )
    known, flags = parser.parse_known_args(arguments)
    if known.runs is not None:
        return _compare_finished(known.runs, known.output, flags)
    if known.config is None:
        raise ConfigError(
            "--config: expected the configuration file of every run (or --runs to compare finished ones)"
        )
    known.output = known.output or Path("runs/compare")
    if not 0 < known.temperature_factor < 1:
        raise ConfigError(
            f"--temperature-factor: expected a number between 0 and 1, got {known.temperature_factor:g}"
        )
    variants = [
        _variant(name, flags, known.temperature_factor) for name in _names(known.objectives, known_names)
    ]
    experiment = Experiment(known.config, tuple(flags), parse_seeds(known.seeds), known.output)
    check_flags(flags)
    rates = parse_rates(known.learning_rates, flags)
    config = experiment.config(variants[0], experiment.seeds[0])
    if config.evaluation.path is None:
        raise ConfigError("evaluation.path: a comparison needs questions to evaluate on")
    if rates:
        check_validation(known.validation, config.evaluation.path, config.data.split)
    if all(variant.temperature_factor is not None for variant in variants):
        raise ConfigError("--objectives: name one that trains; its run evaluates the base model too")
    coldest = known.temperature_factor * min(config.evaluation.temperatures, default=1.0)
    if coldest < LOWEST_TEMPERATURE and any(variant.temperature_factor is not None for variant in variants):
        raise ConfigError(
            f"--temperature-factor: {known.temperature_factor:g} asks {LOWER_TEMPERATURE} for a temperature "
            f"of {coldest:g}; "
            f"expected at least {LOWEST_TEMPERATURE:g}, below which the engine does not sample"
        )
    report = Reporter(enabled=True)
    with experiment.owned("comparison.json"):
        chosen = choose_rates(experiment, variants, rates, known.validation, report) if rates else {}
        variants = with_chosen_rates(variants, chosen)
        experiment.run(variants, report)
        trained = next(variant for variant in variants if variant.temperature_factor is None)
        evaluation = config.evaluation
        gathered = gather(experiment, variants, evaluation.temperatures, evaluation.num_samples, chosen)
        result = gathered | run_settings(experiment, trained)
        write_atomically(known.output / "comparison.json", to_json(result, indent=1) + "\n")
        write_atomically(known.output / "comparison.svg", figure(result))
        write_atomically(known.output / "comparison.md", markdown(result))
    print_table(result, report.console)
    report.line(f"wrote {known.output}/comparison.json, .svg and .md")
    return 0


def _compare_finished(runs: Sequence[Path], output: Path | None, flags: Sequence[str]) -> int:
    if flags:
        raise ConfigError(
            f"--runs: compares finished evaluations and takes no option of rlsc train, got {flags[0]}"
        )
    rows = compare_evaluations(runs)
    print_pairs(rows, Reporter(enabled=True).console)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "paired.json", to_json(rows, indent=1) + "\n")
    return 0


def _names(text: str, known: Sequence[str]) -> list[str]:
    if text == ALL:
        # Offline objectives read another kind of file.
        return [*(name for name, row in OBJECTIVES.items() if not row.is_offline), LOWER_TEMPERATURE]
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) != len(names):
        raise ConfigError(f"--objectives: expected different ones of {', '.join(known)}, got {text!r}")
    return names


def _variant(name: str, flags: Sequence[str], temperature_factor: float) -> Variant:
    if name == LOWER_TEMPERATURE:
        return Variant(name, temperature_factor=temperature_factor)
    given = {flag.partition("=")[0] for flag in flags}
    return Variant(name, tuple(flag for flag in VARIANTS[name] if flag.partition("=")[0] not in given))
