"""State the claims about speed and memory, and judge them from the result of the benchmark that measures
them.

`harness.save` writes the rows of a benchmark's claims into its result file; `acceptance.py` collects them.
Imports no torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.shapes import GOALS, MEMORY_SHAPE, shapes

GIB = 2**30
BF16_BYTES = 2
WHOLE, SHARD, HALF = shapes("cuda", full=False)  # V = 152064, an eighth of it, half of the tokens masked
GPU_DEVICES = ("NVIDIA", "cuda")  # beginnings of the device names in result files
OURS = "shared storage, the rest rewritten (ours)"  # this engine's way to bring weights to the engine
OFFICIAL = "reload_weights, Hugging Face names"
PUBLISHED_SWAP_MS = 2500  # fastest published synchronisation of a colocated trainer (8-27B on 8 GPUs)
WHOLE_LOGITS = "whole logits"
PADDING_LIMIT = 0.02  # share of the tokens that packing computes in vain
GRADING_GOAL_PER_S = 400  # distinct algebraic answers of one core


class NotMeasuredError(Exception):
    """A result is missing; the message names the file or value that was looked for."""


class Numbers:
    """The numbers of one result: `n("memory/saved_bytes")` is the number at that path of keys."""

    def __init__(self, file: str, result: dict[str, Any]) -> None:
        self.file, self.result = file, result

    def __call__(self, path: str) -> float:
        value: Any = self.result
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NotMeasuredError(f"{self.file}.json has no number {path.replace('/', '.')}")
        return float(value)

    def kernel_rows(self, case: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Return the timed row of this engine's default provider (not of a backend that was set by name) in a
        case, and the rows of the peers by name."""
        rows = [row for row in self.result.get("rows", []) if row.get("case") == case and row.get("timing")]
        timed = {row["provider"]: row for row in rows}
        ours = [row for name, row in timed.items() if name == "ours" or name.startswith("ours auto")]
        if not ours:
            raise NotMeasuredError(f"{self.file}.json has nothing of ours timed for {case}")
        return ours[0], {name: row for name, row in timed.items() if not name.startswith("ours")}


class Measured(NamedTuple):
    """The measured value of a claim, whether the claim holds, and the peer's value."""

    text: str
    holds: bool
    peer: str = "-"


class Claim(NamedTuple):
    """A claim about the result of one benchmark, its floor, and the function that judges it."""

    part: str  # of gpu_acceptance.sh; "cpu": the claim needs no GPU
    file: str
    text: str
    floor: str
    judge: Callable[[Numbers], Measured]

    def why_not(self, result: dict[str, Any]) -> str | None:
        """Return the reason why a result cannot support this claim, None if it can."""
        if "skipped" in result:
            return f"{self.file}: {result['skipped']}"
        device = str(result.get("about", {}).get("device", "an unknown device"))
        is_of_device = self.part == "cpu" or device.startswith(GPU_DEVICES)
        return None if is_of_device else f"{self.file}.json is of {device}"

    def row(self, measured: str, holds: bool | None, peer: str = "-") -> dict[str, Any]:
        """Return the claim's row; `holds` is None where nothing was measured."""
        claim = {"part": self.part, "claim": self.text, "floor": self.floor}
        return claim | {"measured": measured, "peer": peer, "holds": holds}


def rows(file: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the claims that the result in `file` can support."""
    found = []
    for claim in CLAIMS:
        if claim.file == file and claim.why_not(result) is None:
            try:
                found.append(claim.row(*claim.judge(Numbers(file, result))))
            except NotMeasuredError as missing:
                found.append(claim.row(f"- ({missing})", None))
    return found


# ------------------------------------------------------------------ kernels


def share(case: str, goal: float) -> Callable[[Numbers], Measured]:
    """Judge that this engine reaches `goal` % of the ceiling."""

    def judge(n: Numbers) -> Measured:
        ours, peers = n.kernel_rows(case)
        percent = ours.get("percent_of_ceiling")
        if percent is None:
            raise NotMeasuredError(f"{n.file}.json has no ceiling for {case}")
        best = max(
            ((row.get("percent_of_ceiling") or 0.0, name) for name, row in peers.items()), default=None
        )
        peer = f"{best[1]} {best[0]:.1f} %" if best and best[0] else "-"
        return Measured(f"{percent:.1f} % ({ours['provider']})", percent >= goal, peer)

    return judge


def fastest(case: str) -> Callable[[Numbers], Measured]:
    """Judge that every peer is slower."""

    def judge(n: Numbers) -> Measured:
        ours, peers = n.kernel_rows(case)
        if not peers:
            raise NotMeasuredError(f"{n.file}.json has no peer for {case}")
        peer_ms, name = min((row["timing"]["median_ms"], name) for name, row in peers.items())
        ratio = peer_ms / ours["timing"]["median_ms"]
        return Measured(f"{ratio:.2f} x the fastest of {len(peers)}", ratio > 1, f"{name} {peer_ms:.3f} ms")

    return judge


def extra_gib(row: dict[str, Any], known_bytes: float = 0.0) -> float:
    """Return the memory that a provider needs beyond its inputs and `known_bytes`."""
    extra = row["timing"].get("peak_extra_bytes")
    if extra is None:
        raise NotMeasuredError("device memory was not measured")
    return (extra - known_bytes) / GIB


def workspace(n: Numbers) -> Measured:
    """Judge the memory of the head beside inputs and gradients."""
    ours, peers = n.kernel_rows(WHOLE.name)
    gradients = BF16_BYTES * WHOLE.hidden_size * (WHOLE.num_tokens + WHOLE.num_columns)
    least = min(((extra_gib(row, gradients), name) for name, row in peers.items()), default=None)
    gib = extra_gib(ours, gradients)
    return Measured(f"{gib:.2f} GiB", gib <= 2.5, f"{least[1]} {least[0]:.2f} GiB" if least else "-")


def head_memory(n: Numbers) -> Measured:
    """Judge the memory of the head against stored logits, which may be out of memory."""
    ours, peers = n.kernel_rows(MEMORY_SHAPE.name)
    if WHOLE_LOGITS in peers:
        theirs = extra_gib(peers[WHOLE_LOGITS])
        spared = theirs - extra_gib(ours)
        return Measured(f"{spared:.1f} GiB below", spared >= 8, f"{WHOLE_LOGITS} {theirs:.1f} GiB")
    case = (MEMORY_SHAPE.name, WHOLE_LOGITS)
    reasons = [
        row.get("skipped") for row in n.result["rows"] if (row.get("case"), row.get("provider")) == case
    ]
    if not reasons or "OutOfMemory" not in str(reasons[0]):
        raise NotMeasuredError(f"{WHOLE_LOGITS} were not measured")
    text = f"{extra_gib(ours):.1f} GiB; {WHOLE_LOGITS} do not fit"
    return Measured(text, True, f"{WHOLE_LOGITS}: out of memory")


# ------------------------------------------------------------------ swap, training, loop, peers, CPU


def at_most(path: str, limit_ms: float) -> Callable[[Numbers], Measured]:
    """Judge that a number is at most `limit_ms`."""
    return lambda n: Measured(f"{n(path):.2f} ms", n(path) <= limit_ms)


def utilisation(shape: str) -> Callable[[Numbers], Measured]:
    """Judge the model FLOPs utilisation of a training step."""

    def judge(n: Numbers) -> Measured:
        mfu, speed = n("utilisation/mfu"), n("tokens_per_s")
        return Measured(f"{mfu:.1%}, {speed:.0f} tokens/s", mfu >= GOALS[shape])

    return judge


def _training_peak(n: Numbers) -> Measured:
    peak = n("memory/device_peak") / GIB
    return Measured(f"{peak:.1f} GiB", peak < 130)


def _official(n: Numbers) -> Measured:
    ratio, theirs_ms = n(f"ways/{OFFICIAL}/ratio"), n(f"ways/{OFFICIAL}/ms")
    return Measured(f"{ratio:.0f} x", ratio >= 50, f"{OFFICIAL} {theirs_ms:.1f} ms")


def _published(n: Numbers) -> Measured:
    ratio = PUBLISHED_SWAP_MS / n(f"ways/{OURS}/ms")
    return Measured(f"{ratio:.0f} x", ratio >= 100, f"published: {PUBLISHED_SWAP_MS} ms")


def _saved(n: Numbers) -> Measured:
    gib = n("memory/saved_bytes") / GIB
    return Measured(f"{gib:.1f} GiB", gib >= 14)


def _rollouts(n: Numbers) -> Measured:
    ratio = n("rollout/ratio")
    return Measured(f"{ratio:.1%}", ratio >= 0.98, "vllm.LLM on the exported weights")


def _overhead(n: Numbers) -> Measured:
    outside = 1 - n("phases/share/rollout") - n("phases/share/train")
    return Measured(f"{outside:.2%}", outside < 0.03)


def _whole_loop(n: Numbers) -> Measured:
    peak, step_s = n("phases/peak_device_bytes") / GIB, n("phases/median_seconds/whole_step")
    return Measured(f"{peak:.1f} GiB, {step_s:.1f} s per step", peak < 130)


def _real_model(n: Numbers) -> Measured:
    rise, p_value = (n(f"rows/rlsc/confidence_f/change/{key}") for key in ("mean", "p_value"))
    accuracy, base = n("rows/rlsc/accuracy_t0.5/change/mean"), n("rows/base/accuracy_t0.5/mean")
    text = f"F {rise:+.3f} (p = {p_value:.3f}), accuracy at T = 0.5 {accuracy:+.3f}"
    return Measured(text, rise > 0 and p_value < 0.05, f"before: {base:.3f} right")


def _trl(n: Numbers) -> Measured:
    if (sampler := n.result.get("sampler_of_trl")) != "colocated vLLM":
        raise NotMeasuredError(f"TRL sampled with {sampler}")
    ratio, theirs_s = n("ratio"), n("seconds_per_1000_tokens/trl")
    return Measured(f"{ratio:.2f} x", ratio >= 1.5, f"TRL {theirs_s:.3f} s per 1000 sampled tokens")


def _padding(n: Numbers) -> Measured:
    worst = max(row["filler_packed"] for row in n.result["rows"])
    return Measured(f"{worst:.2%}", worst < PADDING_LIMIT)


def _grading(n: Numbers) -> Measured:
    (row,) = (row for row in n.result["rows"] if row["mix"] == "algebra_distinct")
    rate = row["answers_per_s_of_one_core_by_cpu"]
    return Measured(
        f"{rate:,} answers/s",
        rate >= GRADING_GOAL_PER_S,
        f"math-verify alone: {rate / row['ratio']:.0f} answers/s",
    )


_transition = at_most("transition_ms/whole", 60)
_COPY, _READ = "a copy's bytes/s, same run", "a read's bytes/s, same run"
_PRODUCTS = "three products at the rate of one, same run"
_MOVED = "one copy of what must move, at this run's copy rate"
_STEP, _FORWARD = "log p and weighted gradient, one pass, in place", "log p alone"
_SWAP = "weight_swap_qwen2.5-7b"
_HEAD, _TRAIN, _LOOP = "linear_log_prob", "train_step_qwen2.5-", "end_to_end_1.5b"
_PEAK, _REQUESTS = "published bf16 rate", "the same requests and settings"
_SIZE, _ANSWERS = "8 x 16 x 1024", "packed, 3072-token answers"
_SMOLLM2 = "SmolLM2-135M, 20 steps on GSM8K, 3 seeds"
_TABLE: dict[str, list[tuple[str, str, str, Callable[[Numbers], Measured]]]] = {
    "kernels": [
        ("log_prob", f"{_STEP}, V = 152064: >= 93 %", _COPY, share(f"step {WHOLE.name}", 93)),
        ("log_prob", f"{_STEP}, V / 8 = 19008: >= 88 %", _COPY, share(f"step {SHARD.name}", 88)),
        ("log_prob", f"{_FORWARD}, V = 152064: >= 95 %", _READ, share(f"forward {WHOLE.name}", 95)),
        ("log_prob", f"{_FORWARD}, V / 8 = 19008: >= 95 %", _READ, share(f"forward {SHARD.name}", 95)),
        ("log_prob", "every peer slower, V = 152064", "-", fastest(f"step {WHOLE.name}")),
        ("log_prob", "every peer slower, V / 8 = 19008", "-", fastest(f"step {SHARD.name}")),
        ("log_prob", "every peer slower, half of the tokens masked", "-", fastest(f"step {HALF.name}")),
        (_HEAD, "head and loss, forward and backward, N = 16384: >= 95 %", _PRODUCTS, share(WHOLE.name, 95)),
        (_HEAD, "the same: at most 2.5 GiB beside inputs and gradients", "-", workspace),
        (_HEAD, "the same: every peer slower, the unweighted one too", "-", fastest(WHOLE.name)),
        (_HEAD, "head and loss of 16 x 3072 tokens: >= 8 GiB below whole logits", "-", head_memory),
    ],
    "swap": [
        (_SWAP, "7B, 8 GiB of KV cache: whole transition <= 60 ms", _MOVED, _transition),
        (_SWAP, "7B: swap part <= 1.0 ms", _MOVED, at_most(f"ways/{OURS}/ms", 1.0)),
        (_SWAP, "7B: checksums of every swap <= 0.25 ms", "-", at_most("verify_ms/checksums", 0.25)),
        (_SWAP, "7B: >= 50 x the official reload path", "-", _official),
        (_SWAP, "7B: >= 100 x the fastest published colocated synchronisation", "-", _published),
        (_SWAP, "7B: >= 14 GiB less than two copies of the weights", "-", _saved),
    ],
    "train": [
        (f"{_TRAIN}1.5b", f"1.5B, {_ANSWERS}: >= 45 % of model FLOPs", _PEAK, utilisation("qwen2.5-1.5b")),
        (f"{_TRAIN}7b", f"7B, {_ANSWERS}: >= 50 % of model FLOPs", _PEAK, utilisation("qwen2.5-7b")),
        (f"{_TRAIN}7b", "7B trains on one GPU: peak below 130 GiB", "-", _training_peak),
    ],
    "loop": [
        (_LOOP, "1.5B, rollouts: >= 98 % of a bare vLLM's tokens/s", _REQUESTS, _rollouts),
        (_LOOP, f"1.5B, {_SIZE}: outside generation and training < 3 % of a step", "-", _overhead),
        ("end_to_end_7b", f"7B, {_SIZE}: the whole loop on one GPU, peak below 130 GiB", "-", _whole_loop),
        ("real_model", f"{_SMOLLM2}: F rises (p < 0.05)", "the same model before", _real_model),
    ],
    "peers": [("peers", f"1.5B, {_SIZE}: whole step >= 1.5 x TRL's GRPO with colocated vLLM", "-", _trl)],
    "cpu": [
        ("packing", f"padding among packed tokens < {PADDING_LIMIT:.0%}", "-", _padding),
        ("grading", f"distinct algebraic answers of one core: >= {GRADING_GOAL_PER_S}/s", "-", _grading),
    ],
}
CLAIMS = [Claim(part, *row) for part, table in _TABLE.items() for row in table]
