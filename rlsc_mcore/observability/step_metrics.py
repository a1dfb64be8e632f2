"""Define the row that each step appends to metrics.jsonl: every field with its label, unit and help text.

The console line, `rlsc watch`, the report, TensorBoard, Weights & Biases and the documentation read this
table. T is the trained temperature. Log-probs are natural logarithms. Shares are fractions of the step's
rollouts over all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Description:
    """Label, help text and display options of a field of `StepMetrics`."""

    label: str
    help: str  # one sentence or two, for the report and the docs
    unit: str = ""  # begins with a space if it is not empty
    path: tuple[str, ...] = ()  # keys inside the field's mapping that lead to the value of the curve
    low: tuple[str, ...] = ()  # keys of the lower edge of a band around the curve; `high`: the upper edge
    high: tuple[str, ...] = ()
    is_curve: bool = False  # drawn as a chart in the report
    watch: str = ""  # label in `rlsc watch`; empty: not shown
    console: str = ""  # format in the console line; empty: not shown


def described(label: str, help: str, unit: str = "", **shown: Any) -> Any:
    """Declare a field of `StepMetrics` with its `Description`."""
    return field(metadata={"description": Description(label, help, unit, **shown)})


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step over all ranks; a value is None if it has no meaning or was not measured."""

    step: int = described("step", "Index of the step, from 0.")
    policy_version: int = described(
        "policy version", "Version of the weights that sampled the step's rollouts: hot swaps so far."
    )
    loss: float = described(
        "loss",
        "The weighted loss; its level depends on answer lengths, so only its fall within a run means "
        "something.",
        is_curve=True,
        watch="loss",
        console="loss {:.4f}",
    )
    f_estimate: float | None = described(
        "F, chance that two samples agree",
        "Mean of p(y|x) over the rollouts at T. What RLSC raises. It rises too while accuracy collapses: no "
        "success by itself. Null where the rollouts are not samples of p at T (another sampling temperature, "
        "top_p < 1) and where p leaves out the tokens of the answer (an outcome mask).",
        is_curve=True,
        watch="F",
        console="F {:.4f}",
    )
    log_p_old: Mapping[str, float] = described(
        "log p of the answers",
        "Median, with the 10 % and 90 % quantiles, of log p(y|x) at T.",
        path=("q50",),
        low=("q10",),
        high=("q90",),
        is_curve=True,
    )
    kl_start: float | None = described(
        "KL from the starting weights",
        "Mean over the trained tokens of the k3 estimate of KL(policy || starting weights), before the step's "
        "update. Null unless `algorithm.kl_start` or the objective compares with these weights.",
        is_curve=True,
    )
    dropped_share: float | None = described(
        "answers without signal",
        "Share of answers to questions whose advantages are all 0. Null without `algorithm.drop_groups`.",
        is_curve=True,
    )
    alpha_share: float = described(
        "alpha's share of the weight",
        "1 means that confidence has underflowed against alpha and every answer weighs the same: plain "
        "self-training.",
        is_curve=True,
        watch="alpha share",
    )
    effective_samples: float = described(
        "effective samples",
        "(sum |w|)² / sum w²: how many answers carry the step. Advantages have both signs.",
        is_curve=True,
    )
    truncated_weight_share: float = described(
        "truncated answers' share of the weight",
        "Sum of |w| over the answers that were cut at the length limit / that of all trained answers. A "
        "repetition loop that was cut has a large weight with `length_normalized` and `token`.",
        is_curve=True,
        watch="truncated weight",
    )
    num_samples: int = described("samples", "Rollouts of the step.")
    mean_length: float = described(
        "mean length",
        "Tokens per answer. A product of probabilities prefers short answers: watch for collapse.",
        " tokens",
        is_curve=True,
        watch="length",
        console="length {:.1f}",
    )
    truncated_share: float = described("truncated answers", "Share cut at the length limit.", is_curve=True)
    distinct_share: float = described(
        "distinct answers",
        "Share of a step's answers that differ. Falls as the policy sharpens.",
        is_curve=True,
        watch="distinct",
        console="distinct {:.0%}",
    )
    boxed_share: float = described(
        "boxed answers",
        "Share of answers with a closed box: how much of a gain may be formatting.",
        is_curve=True,
        watch="boxed",
        console="boxed {:.0%}",
    )
    agreement: float = described(
        "agreement",
        "Mean over questions of the share of samples with the question's most frequent answer. Needs no labels. "
        "It rises as the policy sharpens, whether the answers are right or wrong.",
        is_curve=True,
        watch="agreement",
    )
    answered_share: float = described(
        "readable answers",
        "Share of samples with a box, a stated answer or a number.",
        is_curve=True,
    )
    distinct_answers: float = described(
        "different answers per sample",
        "Mean over questions of different final answers / samples.",
        is_curve=True,
    )
    same_answer_share: float = described(
        "same answer across questions",
        "Largest share of questions that have the same most frequent answer. Different questions have different "
        "answers: a rise is collapse.",
        is_curve=True,
        watch="same answer",
    )
    answer_entropy: float | None = described(
        "entropy of the answer tokens",
        "Mean of -log p at T over the sampled tokens inside the last box: an estimate of their entropy. It is "
        "low where the reasoning determines the answer: compare it with the first steps. Null without a box, "
        "and where the rollouts are not samples of p at T (another sampling temperature, top_p < 1, answers "
        "from a file).",
        " nats",
        is_curve=True,
        watch="answer entropy",
    )
    reasoning_entropy: float | None = described(
        "entropy of the other tokens",
        "The same over the sampled tokens outside the last box.",
        " nats",
        is_curve=True,
    )
    log_prob_gap_mean: float | None = described(
        "mean trainer-engine gap",
        "Mean |trainer - engine| log-prob per sampled token.",
        " nats",
        watch="engine gap",
    )
    log_prob_gap_p99: float | None = described(
        "99th percentile of the gap", "99th percentile of the same.", " nats"
    )
    log_prob_gap_max: float | None = described(
        "largest gap", "Largest |trainer - engine| log-prob of a token.", " nats"
    )
    log_prob_gap_sequence_mean: float | None = described(
        "mean gap per answer", "Mean over answers of |sum of trainer - engine log-probs|.", " nats"
    )
    log_prob_gap_sequence_max: float | None = described(
        "largest gap per answer", "The largest of these.", " nats"
    )
    grad_norm: float = described(
        "gradient norm",
        "Global L2 norm before clipping.",
        is_curve=True,
        watch="grad norm",
        console="grad {:.3f}",
    )
    lr: float = described("learning rate", "As applied.", is_curve=True)
    skipped: bool = described(
        "skipped", "True when loss or gradient norm was not finite and no update was taken."
    )
    updates: Sequence[Mapping[str, Any]] | None = described(
        "updates",
        "Loss, gradient norm and success of each update, where `training.updates_per_rollout` is more than "
        "1.",
    )
    seconds: Mapping[str, float] = described(
        "seconds per phase", "Wall-clock seconds of each phase, device work included.", " s"
    )
    rollout_tokens_per_s: float = described(
        "sampling speed",
        "Tokens per second while sampling, over all ranks.",
        " tokens/s",
        is_curve=True,
        watch="sampling tokens/s",
    )
    train_tokens_per_s: float = described(
        "training speed",
        "Tokens per second while training, prompts included, over all ranks.",
        " tokens/s",
        is_curve=True,
    )
    train_tokens: int = described(
        "trained tokens", "Tokens in all forward passes, prompts and padding included.", " tokens"
    )
    packing: Mapping[str, float] = described(
        "packing",
        "`merged_share`: tokens saved because identical answers share one pass; `padding_share`: padding of "
        "the computed tokens; "
        "`moved_share`: sequences trained on another rank than sampled; `imbalance_sampled`, `imbalance`: "
        "FLOPs of the busiest "
        "rank / mean - 1, before and after they moved.",
    )
    memory_bytes: Mapping[str, int] = described(
        "memory", "Memory of this process and its device at the end of the step.", " bytes"
    )
    engine_imbalance: float = described(
        "engine imbalance", "Tokens of the engine that sampled most / mean - 1."
    )
    memory: Mapping[str, Any] = described(
        "memory owners", "Bytes by owner after each phase, of the fullest rank.", " bytes"
    )
    gpu: Mapping[str, Any] | None = described(
        "GPU", "Power, utilisation, clocks and energy by phase, from NVML."
    )
    warnings: Sequence[str] = described("warnings", "What looks wrong in this step.")

    def row(self) -> dict[str, Any]:
        """Return the row for metrics.jsonl, without `updates` and `gpu` if they are None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in ("updates", "gpu")
        }


DESCRIPTIONS: dict[str, Description] = {
    entry.name: entry.metadata["description"] for entry in fields(StepMetrics)
}


def read_number(row: Mapping[str, Any], *path: str) -> float | None:
    """Return the number at `path` in a row of metrics.jsonl, or None if there is none."""
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) for every number in a row except `step`; nested names are `outer/inner`."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}/")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield prefix + name, float(value)

    return ((name, value) for name, value in walk(row, "") if name != "step")


def console_line(row: Mapping[str, Any]) -> str:
    """Return the step's numbers for the console: `loss 0.1234  F 0.0610  ...`."""
    shown = [
        (description.console, row[name])
        for name, description in DESCRIPTIONS.items()
        if description.console and row[name] is not None
    ]
    return "  ".join(text.format(value) for text, value in shown)
