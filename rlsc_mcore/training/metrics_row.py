"""A step's row of metrics.jsonl, from its rollouts and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import Config
from rlsc_mcore.grading.extraction import extract_boxed
from rlsc_mcore.observability.mismatch import GAPS
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.redistribute import Exchange
from rlsc_mcore.training.step import SequenceScores, StepOutcome
from rlsc_mcore.types import Rollout

QUANTILES = (0.1, 0.5, 0.9)


def step_row(
    config: Config,
    groups: Groups,
    step: int,
    policy_version: int,
    rollouts: Sequence[Rollout],
    exchange: Exchange,
    outcome: StepOutcome,
    seconds: Mapping[str, float],
    memory_bytes: Mapping[str, int],
) -> dict[str, Any]:
    """Summarise one step over all data-parallel ranks, as fields of `StepMetrics`; collective over the data-parallel group.

    F, the quantiles, alpha's share and the effective samples are over the rollouts that have a token to train.
    """
    gathered = groups.gather_objects_over_dp((list(rollouts), outcome.scores, outcome.num_tokens))
    all_rollouts = [rollout for part, _, _ in gathered for rollout in part]
    scores = _concatenate([part for _, part, _ in gathered])
    num_tokens = sum(count for _, _, count in gathered)
    num_samples = len(all_rollouts)
    response_tokens = sum(len(rollout.response_ids) for rollout in all_rollouts)
    distinct = len({(rollout.question_index, rollout.response_ids) for rollout in all_rollouts})
    trained_samples = float(scores.multiplicity.sum())
    comparable = config.rollout.top_p == 1.0 or config.algorithm.log_prob_temperature == "1.0"
    probabilities = scores.log_probs.exp()
    return {
        "step": step,
        "policy_version": policy_version,
        "loss": outcome.loss,
        "f_estimate": float((scores.multiplicity * probabilities).sum()) / max(1.0, trained_samples),
        "log_p_old": _quantiles(scores.log_probs, scores.multiplicity),
        "alpha_share": _alpha_share(WeightedObjective(config.algorithm, num_samples), scores, trained_samples),
        "effective_samples": _effective_samples(scores),
        "num_samples": num_samples,
        "mean_length": response_tokens / num_samples,
        "truncated_share": sum(rollout.finish_reason == "length" for rollout in all_rollouts) / num_samples,
        "distinct_share": distinct / num_samples,
        "boxed_share": sum(extract_boxed(rollout.text) is not None for rollout in all_rollouts) / num_samples,
        **(_gaps(scores) if comparable else dict.fromkeys(GAPS)),
        "grad_norm": outcome.grad_norm,
        "lr": outcome.lr,
        "skipped": not outcome.updated,
        "updates": [vars(update) for update in outcome.updates] if config.training.updates_per_rollout > 1 else None,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rollout_tokens_per_s": round(response_tokens / max(1e-9, seconds["rollout"]), 1),
        "train_tokens_per_s": round(num_tokens / max(1e-9, seconds["train"]), 1),
        "train_tokens": num_tokens,
        "packing": {
            # Of the tokens of all rollouts: spared because identical answers share one pass.
            "merged_share": 1.0 - exchange.num_tokens / max(1, exchange.num_tokens_unmerged),
            # Of the tokens computed: filler up to a multiple of the tensor-parallel size.
            "padding_share": 1.0 - exchange.num_tokens * len(outcome.updates) / max(1, num_tokens),
            "moved_share": exchange.moved_share,
            # By how much the rank with the most FLOPs exceeds the mean: as sampled, and as trained.
            "imbalance_sampled": exchange.imbalance_sampled,
            "imbalance": exchange.imbalance,
        },
        "memory_bytes": dict(memory_bytes),
    }


def _concatenate(parts: Sequence[SequenceScores]) -> SequenceScores:
    if len(parts) == 1:
        return parts[0]
    return SequenceScores(**{entry.name: torch.cat([getattr(part, entry.name) for part in parts]) for entry in fields(SequenceScores)})


def _gaps(scores: SequenceScores) -> dict[str, float]:
    """|trainer - engine| log-prob: mean, 99th percentile (nearest rank) and largest over tokens; of answers' signed sums likewise."""
    tokens, sequences = scores.token_gaps, scores.gap_sums.abs()
    if not len(tokens):
        return dict.fromkeys(GAPS, 0.0)
    rank = math.ceil(0.99 * len(tokens))
    values = (tokens.double().mean(), tokens.kthvalue(rank).values, tokens.max(), sequences.mean(), sequences.max())
    return dict(zip(GAPS, map(float, values), strict=True))


def _quantiles(values: torch.Tensor, multiplicity: torch.Tensor) -> dict[str, float]:
    """Quantiles over samples: a sequence sampled k times counts k times."""
    expanded = torch.repeat_interleave(values, multiplicity.long())
    if not len(expanded):
        return {}
    points = torch.quantile(expanded, torch.tensor(QUANTILES, dtype=expanded.dtype), interpolation="linear").tolist()
    named = {f"q{int(100 * q)}": value for q, value in zip(QUANTILES, points, strict=True)}
    return {"min": float(expanded.min()), **named, "max": float(expanded.max())}


def _alpha_share(objective: WeightedObjective, scores: SequenceScores, num_samples: float) -> float:
    """Share of the total weight that is alpha: 1 means unweighted self-training."""
    total = float((scores.multiplicity * scores.weights).sum())
    return objective.alpha * num_samples / total if total > 0 else 0.0


def _effective_samples(scores: SequenceScores) -> float:
    """(sum w)^2 / sum w^2 over samples."""
    total, squares = (scores.multiplicity * scores.weights).sum(), (scores.multiplicity * scores.weights**2).sum()
    return float(total**2 / squares) if squares > 0 else 0.0
