"""Compute the log confidence of each answer from its token log-probabilities. All values stay in log space;
sums are in float64."""

import torch

from rlsc_mcore.config import Confidence
from rlsc_mcore.ops import sequence_sums


def log_confidence(
    token_log_probs_T: torch.Tensor,
    response_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    kind: Confidence,
    group_values_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the log of the model's confidence in each answer (arXiv 2506.06395, section 2; variants:
    `algorithm.confidence`).

    float32 [T], bool [T], int32 [S + 1] -> float64 [S]. `group_softmax` needs `group_values_S`, the
    logsumexp over the question's samples (`group_log_normalizer`). An answer without trained tokens has log
    confidence 0.
    """
    sums_S = sequence_sums(token_log_probs_T, response_mask_T, cu_seqlens)
    if kind == "length_normalized":
        counts_S = sequence_sums(torch.ones_like(token_log_probs_T), response_mask_T, cu_seqlens)
        return sums_S / counts_S.clamp(min=1.0)
    if kind == "group_softmax":
        assert group_values_S is not None, (
            "group_softmax needs the log-probs of all samples of a question first"
        )
        return sums_S - group_values_S
    return sums_S


def group_log_normalizer(
    sequence_log_probs_S: torch.Tensor, multiplicity_S: torch.Tensor, group_ids_S: torch.Tensor
) -> torch.Tensor:
    """Return for each sequence the log of the sum of p(y|x) over all samples of its question.

    float64 [S] log-probs, float64 [S] multiplicities (a sequence sampled k times counts k times), int64 [S]
    question ids -> float64 [S]. Padding (group -1, multiplicity 0) gets 0.
    """
    num_groups = int(group_ids_S.max()) + 1 if len(group_ids_S) else 0
    terms_S = sequence_log_probs_S + multiplicity_S.log()
    slots_S = torch.where(group_ids_S < 0, num_groups, group_ids_S)
    largest = torch.full((num_groups + 1,), -torch.inf, dtype=torch.float64, device=terms_S.device)
    largest = largest.scatter_reduce(0, slots_S, terms_S, "amax")
    shifted_S = torch.where(group_ids_S < 0, torch.zeros_like(terms_S), (terms_S - largest[slots_S]).exp())
    total = torch.zeros_like(largest).index_add_(0, slots_S, shifted_S)
    return torch.where(group_ids_S < 0, torch.zeros_like(terms_S), largest[slots_S] + total[slots_S].log())
