"""SCRL (arXiv 2603.19880): reward a clear majority, penalise rare answers of high entropy.

With p(a) the share of a question's samples whose answer is a, p1 >= p2 the two largest shares, H(a) the mean
token entropy of the samples with answer a, and Hq that of all samples of the question:

    y+ = the majority answer, if p1 >= 0.375 and p1 - p2 > 0.125, else none
    N- = answers with p(a) < 0.125 and H(a) >= Hq
    R  = p(a) 1[a = y+] + (p(a) - 0.125) 1[a in N-] - 0.1 (H(a) - Hq)

loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t, with A the reward R minus the mean of
its question, divided by the standard deviation (GRPO). The constants are the paper's; its code defaults to 0.5,
0.15 and 0.15. A sample without a readable answer is an answer of its own with share 0.
"""

from collections.abc import Sequence

import torch

from rlsc_mcore.algorithm.pass_reward import PassReward, means_in_groups
from rlsc_mcore.algorithm.rule import GroupSamples
from rlsc_mcore.grading.rewards import answer_shares
from rlsc_mcore.types import Question

MAJORITY, MARGIN, RARE, ENTROPY_WEIGHT = 0.375, 0.125, 0.125, 0.1
_ROUNDING = 1e-9  # of shares that are compared with a constant


def votes(responses: Sequence[str], question: Question | None = None, answers: str = "boxed") -> list[float]:
    """Return 2 * label + share for each response, with label the number of its answer among those of the
    question and share in (0, 1] the share of the responses with this answer; -1 without an answer."""
    labels, shares = answer_shares(responses, question, answers)
    return [2 * label + share if label >= 0 else -1.0 for label, share in zip(labels, shares, strict=True)]


class Scrl(PassReward):
    """Reward by shares of the answers and their entropies."""

    pass_value = "entropy"

    def rewards(self, samples: GroupSamples) -> torch.Tensor:
        """Return R of each sequence, float64 [S]."""
        entropy_S = super().rewards(samples)
        rewards_S = torch.zeros_like(entropy_S)
        means_S = means_in_groups(entropy_S, samples)
        for group in samples.group_ids_S.unique().tolist():
            members = torch.nonzero(samples.group_ids_S == group).flatten()
            if group >= 0:
                rewards_S[members] = self._question(
                    samples.advantages_S[members],
                    entropy_S[members],
                    samples.multiplicity_S[members],
                    means_S[members],
                )
        return rewards_S

    def _question(
        self,
        votes_S: torch.Tensor,
        entropy_S: torch.Tensor,
        counts_S: torch.Tensor,
        mean_S: torch.Tensor,
    ) -> torch.Tensor:
        is_read_S = votes_S >= 0
        label_S = torch.where(is_read_S, (votes_S / 2).floor(), -1.0 - torch.arange(len(votes_S)).to(votes_S))
        share_S = torch.where(is_read_S, votes_S - 2 * label_S, 0.0)
        same_SS = (label_S[:, None] == label_S[None, :]) * counts_S[None, :]
        answer_entropy_S = (same_SS * entropy_S[None, :]).sum(1) / same_SS.sum(1)
        first = share_S.max()
        is_first_S = share_S >= first - _ROUNDING
        other_S = torch.where(label_S == label_S[is_first_S][0], 0.0, share_S)
        is_clear = (first >= MAJORITY - _ROUNDING) & (first - other_S.max() > MARGIN + _ROUNDING)
        is_rare_S = (share_S < RARE - _ROUNDING) & (answer_entropy_S >= mean_S)
        positive_S = torch.where(is_first_S & is_clear, share_S, 0.0)
        negative_S = torch.where(is_rare_S, share_S - RARE, 0.0)
        return positive_S + negative_S - ENTROPY_WEIGHT * (answer_entropy_S - mean_S)
