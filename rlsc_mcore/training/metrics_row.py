"""Compute a step's row of metrics.jsonl from its rollouts and scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import Config
from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.observability.agreement import Agreement, question_row, read_answer, summarise
from rlsc_mcore.observability.answer_tokens import surprise_sums
from rlsc_mcore.observability.mismatch import GAPS
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.run.status import Phase
from rlsc_mcore.types import Exchange, Rollout, SequenceScores, StepResult

QUANTILES = (0.1, 0.5, 0.9)


def step_row(
    config: Config,
    groups: Groups,
    step: int,
    rollouts: Sequence[Rollout],
    result: StepResult,
    seconds: Mapping[Phase, float],
    memory_bytes: Mapping[str, int],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """Summarise one step over all ranks, as fields of `StepMetrics`; collective over the world.

    `rollouts` are those of this rank's engine. `decode` turns token ids into the text that is graded. The
    ranks exchange only sums, counts, minima and maxima. F, the quantiles, alpha's share and the effective
    samples cover the rollouts that have at least one trained token.
    """
    num_samples, response_tokens, truncated, boxed = groups.sums_over_engines(
        [
            len(rollouts),
            sum(len(rollout.response_ids) for rollout in rollouts),
            sum(rollout.finish_reason == "length" for rollout in rollouts),
            sum(extract_boxed(rollout.text) is not None for rollout in rollouts),
        ]
    )
    exchange, outcome = result.exchange, result.outcome
    scores = outcome.scores
    weights, probabilities = scores.weights, scores.log_probs.exp()
    sums = torch.stack(
        [
            torch.tensor(float(outcome.num_tokens), dtype=torch.float64),
            scores.multiplicity.sum(),
            (scores.multiplicity * probabilities).sum(),
            (scores.multiplicity * weights).sum(),
            (scores.multiplicity * weights.abs()).sum(),
            (scores.multiplicity * weights**2).sum(),
            (scores.multiplicity * weights.abs())[_is_truncated(scores, exchange)].sum(),
            (scores.multiplicity * scores.num_tokens).sum(),
            (scores.multiplicity * scores.start_kl_sums).sum(),
        ]
    )
    (
        num_tokens,
        trained_samples,
        probability,
        weight,
        absolute_weight,
        squared_weight,
        truncated_weight,
        trained_tokens,
        start_kl,
    ) = groups.reduce_over_dp(sums).tolist()
    objective = WeightedObjective(config.algorithm, int(num_samples))
    comparable = config.rollout.top_p == 1.0 or config.algorithm.log_prob_temperature == "1.0"
    comparable = comparable and not objective.is_offline  # no engine scored the answers of a file
    return {
        "step": step,
        "policy_version": result.policy_version,
        "loss": outcome.loss,
        "f_estimate": probability / max(1.0, trained_samples) if config.estimates_f else None,
        "log_p_old": _quantiles(scores.log_probs, scores.multiplicity, groups),
        "alpha_share": objective.alpha * trained_samples / weight if weight > 0 else 0.0,
        "effective_samples": absolute_weight**2 / squared_weight if squared_weight > 0 else 0.0,
        "truncated_weight_share": truncated_weight / absolute_weight if absolute_weight > 0 else 0.0,
        "kl_start": start_kl / max(1.0, trained_tokens) if config.compares_with_start else None,
        "dropped_share": exchange.num_dropped / num_samples if config.algorithm.drop_groups else None,
        "num_samples": int(num_samples),
        "mean_length": response_tokens / num_samples,
        "truncated_share": truncated / num_samples,
        "distinct_share": exchange.num_distinct / num_samples,
        "boxed_share": boxed / num_samples,
        **_agreement(rollouts, groups)._asdict(),
        **_entropies(rollouts, config, groups, decode),
        **(_gaps(scores, groups) if comparable else dict.fromkeys(GAPS)),
        "grad_norm": outcome.grad_norm,
        "lr": outcome.lr,
        "skipped": not outcome.updated,
        "updates": [vars(update) for update in outcome.updates]
        if config.training.updates_per_rollout > 1
        else None,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rollout_tokens_per_s": round(response_tokens / max(1e-9, seconds["rollout"]), 1),
        "train_tokens_per_s": round(num_tokens / max(1e-9, seconds["train"]), 1),
        "train_tokens": int(num_tokens),
        "packing": {
            # Fraction of all rollouts' tokens that is not computed, because identical answers share one pass.
            "merged_share": 1.0 - exchange.num_tokens / max(1, exchange.num_tokens_unmerged),
            # Fraction of the computed tokens that pads batches to a multiple of the tensor-parallel size.
            "padding_share": 1.0 - exchange.num_tokens * len(outcome.updates) / max(1, num_tokens),
            "moved_share": exchange.moved_share,
            # FLOPs of the busiest rank / mean - 1: as sampled, and as trained.
            "imbalance_sampled": exchange.imbalance_sampled,
            "imbalance": exchange.imbalance,
        },
        "engine_imbalance": exchange.engine_imbalance,
        "memory_bytes": dict(memory_bytes),
    }


def _is_truncated(scores: SequenceScores, exchange: Exchange) -> torch.Tensor:
    """Return which of the sequences were cut at the length limit, bool [S]."""
    return torch.tensor(
        [
            exchange.sequences[number].rollout.finish_reason == "length"
            for number in scores.sequence_ids.tolist()
        ],
        dtype=torch.bool,
    )


def _agreement(rollouts: Sequence[Rollout], groups: Groups) -> Agreement:
    """Measure the agreement of a step's answers; collective over `engines_group`.

    `rollouts` are those of this rank's engine. Engine `question % num_engines` counts the answers of a
    question, and one table goes to all engines.
    """
    parts: list[list[tuple[int, int, str | None]]] = [[] for _ in range(groups.num_engines)]
    for rollout in rollouts:
        item = (rollout.question_index, rollout.sample_index, read_answer(rollout.text))
        parts[rollout.question_index % groups.num_engines].append(item)
    answers: dict[int, list[tuple[int, str | None]]] = {}
    for part in groups.exchange_objects_over_engines(parts):
        for question, sample, key in part:
            answers.setdefault(question, []).append((sample, key))
    # The order of samples decides between equally frequent answers.
    rows = [question_row([key for _, key in sorted(found, key=lambda item: item[0])]) for found in answers.values()]  # fmt: skip
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    return summarise(torch.cat(groups.gather_tables_over_engines(table)).tolist())


def _entropies(
    rollouts: Sequence[Rollout], config: Config, groups: Groups, decode: Callable[[Sequence[int]], str]
) -> dict[str, float | None]:
    """Estimate the entropy of the answer tokens and of the other tokens; collective over `engines_group`.

    `rollouts` are those of this rank's engine. A value without tokens is None.
    """
    names = ("answer_entropy", "reasoning_entropy")
    if not config.samples_trained_policy:
        return dict.fromkeys(names)
    sums = surprise_sums(rollouts, decode)
    answer, num_answer, reasoning, num_reasoning = groups.sums_over_engines(sums)
    means = (
        answer / num_answer if num_answer else None,
        reasoning / num_reasoning if num_reasoning else None,
    )
    return dict(zip(names, means, strict=True))


def _gaps(scores: SequenceScores, groups: Groups) -> dict[str, float]:
    """Compute |trainer - engine| log-prob over tokens and over answers.

    Collective over the data-parallel group. Over tokens: mean, 99th percentile (nearest rank) and maximum.
    Over answers, of the absolute value of the signed sum: mean and maximum.
    """
    tokens, sequences = scores.token_gaps, scores.gap_sums.abs()
    sums = torch.tensor(
        [len(tokens), float(tokens.double().sum()), len(sequences), float(sequences.sum())],
        dtype=torch.float64,
    )
    num_tokens, token_sum, num_sequences, sequence_sum = groups.reduce_over_dp(sums).tolist()
    if not num_tokens:
        return dict.fromkeys(GAPS, 0.0)
    ones = torch.ones(len(tokens), dtype=torch.int64)
    nearest = math.ceil(0.99 * num_tokens) - 1
    high, largest = order_statistics(tokens.double(), ones, [nearest, int(num_tokens) - 1], groups)
    longest = torch.tensor(float(sequences.max()) if len(sequences) else 0.0, dtype=torch.float64)
    largest_sum = float(groups.reduce_over_dp(longest, dist.ReduceOp.MAX))
    values = (token_sum / num_tokens, high, largest, sequence_sum / num_sequences, largest_sum)
    return dict(zip(GAPS, values, strict=True))


def _quantiles(values: torch.Tensor, multiplicity: torch.Tensor, groups: Groups) -> dict[str, float]:
    """Compute minimum, maximum and linearly interpolated quantiles over samples.

    A sequence sampled k times counts k times. Collective over the data-parallel group.
    """
    counts = multiplicity.long()
    count = int(groups.reduce_over_dp(counts.sum()))
    if not count:
        return {}
    positions = [q * (count - 1) for q in QUANTILES]
    below = [math.floor(position) for position in positions]
    above = [math.ceil(position) for position in positions]
    found = order_statistics(values, counts, [0, *below, *above, count - 1], groups)
    low, high = (
        torch.tensor(found[1 + start :][: len(QUANTILES)], dtype=torch.float64)
        for start in (0, len(QUANTILES))
    )
    fractions = torch.tensor(positions, dtype=torch.float64) - torch.tensor(below, dtype=torch.float64)
    points = torch.lerp(low, high, fractions).tolist()
    named = {f"q{int(100 * q)}": value for q, value in zip(QUANTILES, points, strict=True)}
    return {"min": found[0], **named, "max": found[-1]}


def order_statistics(
    values: torch.Tensor, counts: torch.Tensor, ranks: Sequence[int], groups: Groups
) -> list[float]:
    """Return the values at the given ranks, from 0, in the sorted values of all data-parallel ranks; exact.

    `values` is float64 [N] on the host; each value occurs `counts` (int64 [N]) times. Collective over the
    data-parallel group: eight all-reduces of 256 counts per requested rank, for any N. The algorithm is a
    radix selection: each pass fixes 8 more bits of every result.
    """
    bits = values.contiguous().view(torch.int64)
    # Map the floats to integers of the same order, from 0 on: all bits of negative values are flipped, and the
    # top bit of the others, which places them above.
    keys = torch.where(bits < 0, ~bits, bits ^ torch.iinfo(torch.int64).min)
    prefixes, left = [0] * len(ranks), list(ranks)
    for shift in range(56, -1, -8):
        digits = (keys >> shift) & 0xFF
        table = torch.zeros(len(ranks), 256, dtype=torch.int64)
        for number, prefix in enumerate(prefixes):
            chosen = (keys >> shift >> 8) & ((1 << (56 - shift)) - 1) == prefix
            table[number] = torch.zeros(256, dtype=torch.int64).index_add_(0, digits[chosen], counts[chosen])
        for number, row in enumerate(groups.reduce_over_dp(table).cumsum(dim=1)):
            digit = int(torch.searchsorted(row, left[number], right=True))
            left[number] -= int(row[digit - 1]) if digit else 0
            prefixes[number] = prefixes[number] << 8 | digit
    found = torch.tensor(
        [prefix - (1 << 64) if prefix >= 1 << 63 else prefix for prefix in prefixes], dtype=torch.int64
    )
    bits = torch.where(found < 0, found ^ torch.iinfo(torch.int64).min, ~found)
    return bits.view(torch.float64).tolist()
