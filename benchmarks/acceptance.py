"""Write the table of the claims about one GPU: `python -m benchmarks.acceptance [FOLDER]`. Each row has the
claim, its floor, the measured value, the best peer, and whether the claim holds.

Reads the result files of the benchmarks in FOLDER (default: benchmarks/results/h200), writes acceptance.json
and acceptance.md beside them, and prints the table. A claim without a result file is "not measured". Imports
no torch.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import GOALS, MEMORY_SHAPE, shapes

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
BF16_BYTES = 2
WHOLE, SHARD, HALF = shapes("cuda", full=False)  # V = 152064, an eighth of it, half of the tokens masked
GPU_DEVICES = ("NVIDIA", "cuda")  # beginnings of the device names in result files
REACHED, MISSED, NOT_MEASURED = "reached", "MISSED", "not measured"


class NotMeasuredError(Exception):
    """A result is missing; the message names the file or value that was looked for."""


@dataclass(frozen=True)
class Measured:
    """The measured value of a claim, whether the claim holds, and the peer's value."""

    text: str
    holds: bool
    peer: str = "-"


class Results:
    """The result files of one folder. A missing file or value raises `NotMeasuredError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> dict[str, Any]:
        """Return NAME.json."""
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotMeasuredError(f"no {name}.json") from None
        except (OSError, ValueError) as error:
            raise NotMeasuredError(f"{name}.json cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise NotMeasuredError(f"{name}.json holds no object")
        if "skipped" in content:
            raise NotMeasuredError(f"{name}: {content['skipped']}")
        device = str(content.get("about", {}).get("device", "an unknown device"))
        if not device.startswith(GPU_DEVICES):
            raise NotMeasuredError(f"{name}.json is of {device}")
        return content

    def number(self, name: str, *path: str) -> float:
        """Return the number of NAME.json at the path of keys `path`."""
        value: Any = self.file(name)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NotMeasuredError(f"{name}.json has no number {'.'.join(path)}")
        return float(value)

    def rows(self, name: str, case: str) -> dict[str, dict[str, Any]]:
        """Return the timed rows of a case by provider."""
        found = {
            row["provider"]: row
            for row in self.file(name).get("rows", [])
            if row.get("case") == case and row.get("timing")
        }
        if not found:
            raise NotMeasuredError(f"{name}.json has nothing timed for {case}")
        return found


@dataclass(frozen=True)
class Mark:
    """One claim, the floor that it is compared with, and the function that reads it from the results."""

    part: str
    claim: str
    floor: str
    read: Callable[[Results], Measured]


def marks() -> list[Mark]:
    """Return all claims, in the order of the parts of `gpu_acceptance.sh`."""
    return [*_kernel_marks(), *_swap_marks(), *_train_marks(), *_loop_marks(), *_peer_marks()]


def judge(results: Results) -> list[dict[str, str]]:
    """Return one row per claim: part, claim, floor, measured, peer, outcome."""
    lines = []
    for mark in marks():
        line = {"part": mark.part, "claim": mark.claim, "floor": mark.floor}
        try:
            measured = mark.read(results)
        except NotMeasuredError as missing:
            lines.append({**line, "measured": f"- ({missing})", "peer": "-", "outcome": NOT_MEASURED})
            continue
        lines.append(
            {
                **line,
                "measured": measured.text,
                "peer": measured.peer,
                "outcome": REACHED if measured.holds else MISSED,
            }
        )
    return lines


def table(lines: list[dict[str, str]]) -> str:
    """Format the rows as a Markdown table, followed by the count of each result."""
    head = ["part", "claim", "floor", "measured", "peer", "outcome"]
    rows = ["| " + " | ".join(line[name].replace("|", "/") for name in head) + " |" for line in lines]
    outcomes = [line["outcome"] for line in lines]
    count = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (REACHED, MISSED, NOT_MEASURED))
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *rows, "", count])


# ------------------------------------------------------------------ kernels


def _kernel_marks() -> list[Mark]:
    copy, read = "a copy's bytes/s, same run", "a read's bytes/s, same run"
    one_pass, forward = "log p and weighted gradient, one pass, in place", "log p alone"
    product = "three products at the rate of one, same run"
    return [
        Mark(
            "kernels", f"{one_pass}, V = 152064: >= 93 %", copy, _share("log_prob", f"step {WHOLE.name}", 93)
        ),
        Mark(
            "kernels",
            f"{one_pass}, V / 8 = 19008: >= 88 %",
            copy,
            _share("log_prob", f"step {SHARD.name}", 88),
        ),
        Mark(
            "kernels",
            f"{forward}, V = 152064: >= 95 %",
            read,
            _share("log_prob", f"forward {WHOLE.name}", 95),
        ),
        Mark(
            "kernels",
            f"{forward}, V / 8 = 19008: >= 95 %",
            read,
            _share("log_prob", f"forward {SHARD.name}", 95),
        ),
        Mark("kernels", "every peer slower, V = 152064", "-", _beats("log_prob", f"step {WHOLE.name}")),
        Mark("kernels", "every peer slower, V / 8 = 19008", "-", _beats("log_prob", f"step {SHARD.name}")),
        Mark(
            "kernels",
            "every peer slower, half of the tokens masked",
            "-",
            _beats("log_prob", f"step {HALF.name}"),
        ),
        Mark(
            "kernels",
            "head and loss, forward and backward, N = 16384: >= 95 %",
            product,
            _share("linear_log_prob", WHOLE.name, 95),
        ),
        Mark("kernels", "the same: at most 2.5 GiB beside inputs and gradients", "-", _workspace),
        Mark(
            "kernels",
            "the same: every peer slower, the unweighted one too",
            "-",
            _beats("linear_log_prob", WHOLE.name),
        ),
        Mark("kernels", "head and loss of 16 x 3072 tokens: >= 8 GiB below whole logits", "-", _head_memory),
    ]


def _ours(rows: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return this engine's default provider (not a backend that was set by name) and the peers."""
    mine = [row for name, row in rows.items() if name == "ours" or name.startswith("ours auto")]
    if not mine:
        raise NotMeasuredError("ours was not timed there")
    return mine[0], {name: row for name, row in rows.items() if not name.startswith("ours")}


def _share(file: str, case: str, goal: float) -> Callable[[Results], Measured]:
    def read(results: Results) -> Measured:
        mine, peers = _ours(results.rows(file, case))
        share = mine.get("percent_of_ceiling")
        if share is None:
            raise NotMeasuredError(f"{file}.json has no ceiling for {case}")
        best = max(
            (
                (row["percent_of_ceiling"], name)
                for name, row in peers.items()
                if row.get("percent_of_ceiling")
            ),
            default=None,
        )
        return Measured(
            f"{share:.1f} % ({mine['provider']})",
            share >= goal,
            f"{best[1]} {best[0]:.1f} %" if best else "-",
        )

    return read


def _beats(file: str, case: str) -> Callable[[Results], Measured]:
    def read(results: Results) -> Measured:
        mine, peers = _ours(results.rows(file, case))
        if not peers:
            raise NotMeasuredError(f"{file}.json has no peer for {case}")
        fastest = min(peers, key=lambda name: float(peers[name]["timing"]["median_ms"]))
        ratio = peers[fastest]["timing"]["median_ms"] / mine["timing"]["median_ms"]
        return Measured(
            f"{ratio:.2f} x the fastest of {len(peers)}",
            ratio > 1,
            f"{fastest} {peers[fastest]['timing']['median_ms']:.3f} ms",
        )

    return read


def _extra_bytes(row: dict[str, Any]) -> float:
    extra = row["timing"].get("peak_extra_bytes")
    if extra is None:
        raise NotMeasuredError("device memory was not measured")
    return float(extra)


def _workspace(results: Results) -> Measured:
    mine, peers = _ours(results.rows("linear_log_prob", WHOLE.name))
    gradients = BF16_BYTES * WHOLE.hidden_size * (WHOLE.num_tokens + WHOLE.num_columns)

    def workspace(row: dict[str, Any]) -> float:
        return (_extra_bytes(row) - gradients) / GIB

    least = min(peers, key=lambda name: _extra_bytes(peers[name]), default=None)
    told = "-" if least is None else f"{least} {workspace(peers[least]):.2f} GiB"
    return Measured(f"{workspace(mine):.2f} GiB", workspace(mine) <= 2.5, told)


def _head_memory(results: Results) -> Measured:
    rows = results.rows("linear_log_prob", MEMORY_SHAPE.name)
    mine, peers = _ours(rows)
    if "whole logits" not in peers:
        reasons = [
            row.get("skipped")
            for row in results.file("linear_log_prob")["rows"]
            if (row.get("case"), row.get("provider")) == (MEMORY_SHAPE.name, "whole logits")
        ]
        if not reasons or "OutOfMemory" not in str(reasons[0]):
            raise NotMeasuredError("whole logits were not measured")
        return Measured(
            f"{_extra_bytes(mine) / GIB:.1f} GiB; whole logits do not fit",
            True,
            "whole logits: out of memory",
        )
    spared = (_extra_bytes(peers["whole logits"]) - _extra_bytes(mine)) / GIB
    return Measured(
        f"{spared:.1f} GiB below",
        spared >= 8,
        f"whole logits {_extra_bytes(peers['whole logits']) / GIB:.1f} GiB",
    )


# ------------------------------------------------------------------ training


def _train_marks() -> list[Mark]:
    return [
        _utilisation("1.5B", "qwen2.5-1.5b"),
        _utilisation("7B", "qwen2.5-7b"),
        Mark("train", "7B trains on one GPU: peak below 130 GiB", "-", _peak),
    ]


def _utilisation(size: str, shape: str) -> Mark:
    file, goal = f"train_step_{shape}", GOALS[shape]

    def read(results: Results) -> Measured:
        share, speed = results.number(file, "utilisation", "mfu"), results.number(file, "tokens_per_s")
        return Measured(f"{share:.1%}, {speed:.0f} tokens/s", share >= goal)

    return Mark(
        "train",
        f"{size}, packed, 3072-token answers: >= {100 * goal:.0f} % of model FLOPs",
        "published bf16 rate",
        read,
    )


def _peak(results: Results) -> Measured:
    peak = results.number("train_step_qwen2.5-7b", "memory", "device_peak") / GIB
    return Measured(f"{peak:.1f} GiB", peak < 130)


# ------------------------------------------------------------------ the loop and its peers


def _loop_marks() -> list[Mark]:
    file = "end_to_end_1.5b"

    def rollouts(results: Results) -> Measured:
        ratio = results.number(file, "rollout", "ratio_median")
        return Measured(f"{ratio:.1%}", ratio >= 0.98, "vllm.LLM on the exported weights")

    def overhead(results: Results) -> Measured:
        share = (
            1
            - results.number(file, "phases", "share", "rollout")
            - results.number(file, "phases", "share", "train")
        )
        return Measured(f"{share:.2%}", share < 0.03)

    def whole_loop(results: Results) -> Measured:
        peak = results.number("end_to_end_7b", "phases", "peak_device_bytes") / GIB
        step = results.number("end_to_end_7b", "phases", "median_seconds", "whole_step")
        return Measured(f"{peak:.1f} GiB, {step:.1f} s per step", peak < 130)

    def real_model(results: Results) -> Measured:
        change = ("rows", "rlsc", "confidence_f", "change")
        rise, p_value = (results.number("real_model", *change, name) for name in ("mean", "p_value"))
        accuracy = results.number("real_model", "rows", "rlsc", "accuracy_t0.5", "change", "mean")
        base = results.number("real_model", "rows", "base", "accuracy_t0.5", "mean")
        told = f"F {rise:+.3f} (p = {p_value:.3f}), accuracy at T = 0.5 {accuracy:+.3f}"
        return Measured(told, rise > 0 and p_value < 0.05, f"before: {base:.3f} right")

    return [
        Mark(
            "loop",
            "1.5B, rollouts: >= 98 % of a bare vLLM's tokens/s",
            "the same requests and settings",
            rollouts,
        ),
        Mark("loop", "1.5B, 8 x 16 x 1024: outside generation and training < 3 % of a step", "-", overhead),
        Mark("loop", "7B, 8 x 16 x 1024: the whole loop on one GPU, peak below 130 GiB", "-", whole_loop),
        Mark(
            "loop",
            "SmolLM2-135M, 20 steps on GSM8K, 3 seeds: F rises (p < 0.05)",
            "the same model before",
            real_model,
        ),
    ]


def _swap_marks() -> list[Mark]:
    file = "weight_swap_qwen2.5-7b"
    ours, official = "shared storage, the rest rewritten (ours)", "reload_weights, Hugging Face names"
    published_ms = 2500.0  # fastest published weight synchronisation of a colocated trainer (8-27B on 8 GPUs)

    def at_most(limit_ms: float, *path: str) -> Callable[[Results], Measured]:
        def read(results: Results) -> Measured:
            value = results.number(file, *path)
            return Measured(f"{value:.2f} ms", value <= limit_ms)

        return read

    def official_path(results: Results) -> Measured:
        ratio = results.number(file, "ways", official, "times_ours")
        return Measured(
            f"{ratio:.0f} x", ratio >= 50, f"{official} {results.number(file, 'ways', official, 'ms'):.1f} ms"
        )

    def published(results: Results) -> Measured:
        ratio = published_ms / results.number(file, "ways", ours, "ms")
        return Measured(f"{ratio:.0f} x", ratio >= 100, f"published: {published_ms:.0f} ms")

    def saved(results: Results) -> Measured:
        gib = results.number(file, "memory", "saved_bytes") / GIB
        return Measured(f"{gib:.1f} GiB", gib >= 14)

    copy = "one copy of what must move, at this run's copy rate"
    return [
        Mark(
            "swap",
            "7B, 8 GiB of KV cache: whole transition <= 60 ms",
            copy,
            at_most(60, "transition_ms", "whole"),
        ),
        Mark("swap", "7B: swap part <= 1.0 ms", copy, at_most(1.0, "ways", ours, "ms")),
        Mark("swap", "7B: checksums of every swap <= 0.25 ms", "-", at_most(0.25, "verify_ms", "checksums")),
        Mark("swap", "7B: >= 50 x the official reload path", "-", official_path),
        Mark("swap", "7B: >= 100 x the fastest published colocated synchronisation", "-", published),
        Mark("swap", "7B: >= 14 GiB less than two copies of the weights", "-", saved),
    ]


def _peer_marks() -> list[Mark]:
    def step(results: Results) -> Measured:
        sampler = results.file("peers").get("sampler_of_trl")
        if sampler != "colocated vLLM":
            raise NotMeasuredError(f"TRL sampled with {sampler}")
        ratio = results.number("peers", "times_ours")
        theirs = results.number("peers", "seconds_per_1000_tokens", "trl")
        return Measured(f"{ratio:.2f} x", ratio >= 1.5, f"TRL {theirs:.3f} s per 1000 sampled tokens")

    return [
        Mark("peers", "1.5B, 8 x 16 x 1024: whole step >= 1.5 x TRL's GRPO with colocated vLLM", "-", step)
    ]


def main() -> None:
    """Print the table and write it beside the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=RESULTS / "h200", help="folder of the result files"
    )
    folder = parser.parse_args().folder
    lines = judge(Results(folder))
    text = table(lines)
    print(text)
    if not folder.is_dir():
        return
    sources = {
        path.stem: _source(path) for path in sorted(folder.glob("*.json")) if path.stem != "acceptance"
    }
    content = {"marks": lines, "sources": sources}
    (folder / "acceptance.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "acceptance.md").write_text(text + "\n", encoding="utf-8")


def _source(path: Path) -> dict[str, Any]:
    """Return command, commit and device of a result file."""
    try:
        about = json.loads(path.read_text(encoding="utf-8")).get("about", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: about[name] for name in ("command", "commit", "device") if name in about}


if __name__ == "__main__":
    main()
