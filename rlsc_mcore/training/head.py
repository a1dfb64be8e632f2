"""Compute the loss and the log-probs of a micro-batch from the hidden states of the last pipeline stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlsc_mcore.algorithm.entropy import entropy_loss
from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.algorithm.rule import PassValue
from rlsc_mcore.config import DistillConfig
from rlsc_mcore.ops import (
    linear_kl_loss,
    linear_self_certainty,
    linear_token_log_probs,
    linear_weighted_loss,
)
from rlsc_mcore.ops.chunks import live_tokens
from rlsc_mcore.types import PackedBatch, over_tokens

TEACHER_PART = {"forward_kl": 0.0, "jsd": 0.5}  # `beta` of linear_kl_loss


@dataclass(frozen=True)
class Distillation:
    """What a batch is distilled from: the teacher's hidden states, its output weight, and the divergence."""

    options: DistillConfig
    hidden: torch.Tensor | None  # [N, H], one row per distilled token, whole on every rank; None: no token
    weight: torch.Tensor | None  # the teacher's output weight [Vp, H]; None: the policy's


@dataclass(frozen=True)
class StartLogProbs:
    """Log-probs of a batch's trained tokens by the starting weights, 0 elsewhere."""

    question: torch.Tensor  # float32 [T], behind the question
    careless: torch.Tensor | None = None  # float32 [T], behind the careless prompt of `nsd`


class WeightedHead:
    """The head that `PolicyModel` calls: hidden [T / tp, H], weight [Vp, H] -> (loss, log p).

    The loss is float64 []; log p is float32 [T] and detached, 0 outside the response mask.
    """

    def __init__(
        self,
        batch: PackedBatch,
        objective: WeightedObjective,
        options: Mapping[str, Any],
        normalizer: torch.Tensor | None,
        old_log_probs: torch.Tensor | None,
        distillation: Distillation | None = None,
        start: StartLogProbs | None = None,
    ) -> None:
        """`options` are the keyword arguments of the kernels.

        `normalizer` (float64 [S]) holds the normalisers of an objective that needs its group.
        `old_log_probs` (float32 [T]) are those of the first pass; None in the first pass. `distillation` is
        given for an objective that distils, `start` for one that compares with the starting weights.
        """
        self._batch, self._objective, self._options = batch, objective, options
        self._normalizer = normalizer
        self._distillation = distillation
        self._old_live = self._live(old_log_probs)  # [trained tokens]
        self._start_live = self._live(None if start is None else start.question)
        self._careless_live = self._live(None if start is None else start.careless)

    def _live(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Return the values of the trained tokens, [trained tokens]."""
        if values is None:
            return None
        return values[live_tokens(self._batch.response_mask, None, self._batch.trained_lengths).positions]

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, log p); collective over the tensor-parallel group.

        The weighted loss adds the gradient of `weight` to its `main_grad` during this call.
        """
        batch = self._batch
        if self._objective.trains_entropy:
            return self._entropy(hidden, weight)
        if self._distillation is None:
            return self._weighted(hidden, weight)
        divergence = self._divergence(hidden, weight, self._distillation)
        if self._distillation.options.penalty:
            loss, log_probs = self._weighted(hidden, weight)
            return loss + divergence, log_probs
        with torch.no_grad():
            log_probs = linear_token_log_probs(
                hidden,
                weight,
                batch.target_ids,
                mask_T=batch.response_mask,
                num_live=sum(batch.trained_lengths),
                **self._options,
            )
        return divergence, log_probs

    def _weighted(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._batch
        return linear_weighted_loss(
            hidden,
            weight,
            batch.target_ids,
            mask_T=batch.response_mask,
            cu_seqlens=batch.cu_seqlens,
            coefficient_fn=self.coefficients,
            live_counts=batch.trained_lengths,
            unit_upstream=True,
            **self._options,
        )

    def _divergence(
        self, hidden: torch.Tensor, weight: torch.Tensor, distillation: Distillation
    ) -> torch.Tensor:
        """Return the weighted sum of the distilled tokens' divergences, float64 []."""
        batch, teacher_hidden = self._batch, distillation.hidden
        mask = batch.distilled_mask
        if teacher_hidden is None:
            mask, teacher_hidden = torch.zeros_like(mask), hidden.new_zeros(0, hidden.shape[1])
        divisor = self._objective.num_samples if self._objective.algorithm.reduction == "mean" else 1
        value_S = batch.advantages.clamp(min=0.0) * batch.multiplicity / divisor
        return linear_kl_loss(
            hidden,
            teacher_hidden,
            weight,
            coefficients_T=over_tokens(value_S, batch.cu_seqlens, len(mask)),
            mask_T=mask,
            teacher_weight_VpH=distillation.weight,
            beta=TEACHER_PART[distillation.options.divergence],
            clip=distillation.options.clip,
            num_live=len(teacher_hidden),
            unit_upstream=True,
            **self._options,
        )[0]

    def coefficients(
        self, log_probs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, sequences: slice
    ) -> torch.Tensor:
        """Return the coefficients (float32 [C]) of the trained tokens of a chunk of whole sequences.

        `log_probs` and `mask` are [C]. `sequences` are the positions of the chunk's sequences in the batch.
        """
        batch, current = self._batch, None
        first = sum(batch.trained_lengths[: sequences.start])
        chunk = slice(first, first + len(log_probs))
        if self._old_live is not None:
            current, log_probs = log_probs, self._old_live[chunk]
        start_T = None if self._start_live is None else self._start_live[chunk]
        careless_T = None if self._careless_live is None else self._careless_live[chunk]
        normalizer_S = None if self._normalizer is None else self._normalizer[sequences]
        multiplicity_S, advantages_S = batch.multiplicity[sequences], batch.advantages[sequences]
        return self._objective.token_coefficients(
            log_probs,
            mask,
            cu_seqlens,
            multiplicity_S,
            normalizer_S,
            advantages_S,
            current,
            start_T,
            careless_T,
        )

    def _entropy(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, objective = self._batch, self._objective
        log_probs, entropy = linear_token_log_probs(
            hidden,
            weight,
            batch.target_ids,
            mask_T=batch.response_mask,
            num_live=sum(batch.trained_lengths),
            with_entropy=True,
            **self._options,
        )
        divisor = objective.num_samples if objective.algorithm.reduction == "mean" else 1
        loss = entropy_loss(entropy, batch.response_mask, batch.cu_seqlens, batch.multiplicity, divisor)
        return loss, log_probs.detach()


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: PackedBatch,
    value: PassValue,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Return log-prob, entropy or self-certainty of each token, float32 [T]; 0 outside the response mask.

    `options` are the keyword arguments of the kernels. Collective over the tensor-parallel group.
    """
    live: dict[str, Any] = {"mask_T": batch.response_mask, "num_live": sum(batch.trained_lengths)}
    if value == "entropy":
        return linear_token_log_probs(hidden, weight, batch.target_ids, with_entropy=True, **live, **options)[
            1
        ]
    log_probs = linear_token_log_probs(hidden, weight, batch.target_ids, **live, **options)
    if value == "log_prob":
        return log_probs
    shared = {name: kept for name, kept in options.items() if name not in ("logits_dtype", "backend")}
    return linear_self_certainty(hidden, weight, batch.target_ids, log_probs, **live, **shared)
