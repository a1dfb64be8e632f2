"""Direct preference optimization (DPO, arXiv 2305.18290, equation 7) of a chosen and a rejected answer.

loss = - sum over pairs of w [log sigmoid(beta m) + nll log p(y_w|x) / |y_w|], where
m = [log p(y_w|x) - log p_ref(y_w|x)] - [log p(y_l|x) - log p_ref(y_l|x)].

`dpo` reads the pairs (w = 1) from a file; p_ref are the starting weights. `scpo` (arXiv 2411.04109, equation 2)
pairs a sample with the most frequent answer and one with the least frequent answer; w is the difference of their
shares of the votes, and p_ref is the policy that sampled. The gradient with respect to log p(y) is
A [beta sigmoid(-beta m) + nll [A > 0] / |y|], with the advantage A = w for y_w and -w for y_l.
"""

import torch

from rlsc_mcore.algorithm.rule import GroupSamples, ObjectiveRule, ScoredSequences
from rlsc_mcore.ops import sequence_sums


class Preference(ObjectiveRule):
    """Weight the two answers of a pair by the gradient of the pair's loss, with opposite signs."""

    is_pairwise = True

    @property
    def needs_group(self) -> bool:
        """True: the weight of an answer depends on the other answer of its pair."""
        return True

    def group_values(self, samples: GroupSamples) -> torch.Tensor:
        """Return m of each sequence's question, float64 [S]; 0 for padding and for questions without a pair.

        `values_S` holds log p(y) - log p_ref(y). Several sequences on one side of a pair are averaged.
        """
        log_ratios_S, group_ids_S = samples.values_S, samples.group_ids_S
        signed_counts_S = samples.multiplicity_S * samples.advantages_S
        num_groups = int(group_ids_S.max()) + 1 if len(group_ids_S) else 0
        slots_S = torch.where(group_ids_S < 0, num_groups, group_ids_S)
        zeros = torch.zeros(num_groups + 1, dtype=torch.float64, device=log_ratios_S.device)
        chosen_S, rejected_S = signed_counts_S.clamp(min=0.0), (-signed_counts_S).clamp(min=0.0)
        sums = [zeros.index_add(0, slots_S, side_S * log_ratios_S) for side_S in (chosen_S, rejected_S)]
        counts = [zeros.index_add(0, slots_S, side_S) for side_S in (chosen_S, rejected_S)]
        margins = sums[0] / counts[0] - sums[1] / counts[1]
        is_pair = (counts[0] > 0) & (counts[1] > 0)
        return torch.where(group_ids_S < 0, 0.0, torch.where(is_pair, margins, 0.0)[slots_S])

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the weights, float64 [S]: positive for chosen answers, negative for rejected ones."""
        margins_S, advantages_S = scored.group_values_S, scored.advantages_S
        assert margins_S is not None and advantages_S is not None, "both answers of a pair are scored first"
        beta, mask_T = self.algorithm.dpo_beta, scored.response_mask_T
        lengths_S = sequence_sums(mask_T.double(), mask_T, scored.cu_seqlens).clamp(min=1.0)
        likelihood_S = torch.where(advantages_S > 0, self.algorithm.dpo_nll / lengths_S, 0.0)
        return advantages_S * (beta * torch.sigmoid(-beta * margins_S) + likelihood_S)
