"""Control for RLSC: the same weights, assigned to the samples of each question at random.

loss = - sum_y (confidence(pi(y)) + alpha) log p(y|x), with pi a random permutation of the question's samples.
The distributions of weights and of samples do not change; only the assignment of weights to samples does. A
gain that this control also shows is not caused by the model's confidence.
"""

import math

import torch

from rlsc_mcore.algorithm.rlsc import Rlsc
from rlsc_mcore.algorithm.rule import GroupSamples, ScoredSequences


class ShuffledConfidence(Rlsc):
    """Weight each sample by the confidence of a random sample of its question, plus alpha."""

    @property
    def needs_group(self) -> bool:
        """True: the weights of a question's samples are permuted among these samples."""
        return True

    def group_values(self, samples: GroupSamples) -> torch.Tensor:
        """Return the log of each sequence's mean confidence after the permutation, float64 [S]; 0 for padding
        (group -1).

        A sequence sampled k times is k samples and gets the mean of k confidences. The permutation is seeded
        with the log-probs, so it needs no state and is equal on every rank.
        """
        log_probs, counts = samples.values_S.cpu(), samples.multiplicity_S.cpu().long()
        groups = samples.group_ids_S.cpu()
        values = torch.zeros_like(log_probs)
        for group in sorted(set(groups[groups >= 0].tolist())):
            members = torch.nonzero(groups == group).flatten()
            sampled = (
                log_probs[members].repeat_interleave(counts[members]).sort().values
            )  # sorted, so the order is equal on every rank
            generator = torch.Generator().manual_seed(int(abs(float(sampled.sum())) * 100) % 2**31 + group)
            dealt = sampled[torch.randperm(len(sampled), generator=generator)]
            order = members[torch.argsort(log_probs[members], stable=True)]
            for member, share in zip(order.tolist(), dealt.split(counts[order].tolist()), strict=True):
                values[member] = torch.logsumexp(share, 0) - math.log(len(share)) if len(share) else 0.0
        return values.to(samples.values_S.device)

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the permuted confidence + alpha, float64 [S]."""
        assert scored.group_values_S is not None, (
            "shuffled weights need the log-probs of all samples of a question first"
        )
        return self._plus_alpha(scored.group_values_S)

    def token_weights(self, scored: ScoredSequences) -> torch.Tensor | None:
        """Return None: all tokens of a sample have its weight."""
        return None
