"""Group-relative policy gradient whose reward is read off a pass: the loss of group_reward.py.

loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t, with A(y) the reward minus the mean
reward of its question, optionally divided by the standard deviation. The reward is a mean over the tokens of the
answer, so all samples are scored before the pass that trains: one forward pass more than the other rewards.
"""

import torch

from rlsc_mcore.algorithm.group_reward import GroupReward
from rlsc_mcore.algorithm.rule import GroupSamples, ScoredSequences

_SMALLEST_DEVIATION = 1e-6  # below it the rewards of a question differ by rounding only and are not divided


class PassReward(GroupReward):
    """Weight each sample by the advantage of a reward that the scoring pass gives."""

    @property
    def needs_group(self) -> bool:
        """True: advantages compare the samples of a question."""
        return True

    def rewards(self, samples: GroupSamples) -> torch.Tensor:
        """Return the reward of each sequence, float64 [S]: here the mean of `pass_value` over its tokens."""
        return samples.values_S / samples.num_tokens_S.clamp(min=1.0)

    def group_values(self, samples: GroupSamples) -> torch.Tensor:
        """Return the advantages, float64 [S]; 0 for padding."""
        return centered_in_groups(
            self.rewards(samples), samples, standardize=self.algorithm.advantage == "standardized"
        )

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return the advantages, float64 [S]."""
        assert scored.group_values_S is not None, "a reward of the pass needs its samples scored first"
        return scored.group_values_S


def means_in_groups(values_S: torch.Tensor, samples: GroupSamples) -> torch.Tensor:
    """Return for each sequence the mean of the values over the samples of its question, float64 [S]; a
    sequence sampled k times counts k times. Padding gets 0."""
    return _sums_in_groups(values_S, samples) / _sums_in_groups(torch.ones_like(values_S), samples).clamp(
        min=1.0
    )


def centered_in_groups(rewards_S: torch.Tensor, samples: GroupSamples, *, standardize: bool) -> torch.Tensor:
    """Return each reward minus the mean of its question, float64 [S]; with `standardize` divided by the
    sample standard deviation (n - 1). Padding gets 0."""
    is_real_S = samples.group_ids_S >= 0
    centered_S = torch.where(is_real_S, rewards_S - means_in_groups(rewards_S, samples), 0.0)
    if not standardize:
        return centered_S
    num_samples_S = _sums_in_groups(torch.ones_like(centered_S), samples)
    squares_S = _sums_in_groups(centered_S**2, samples)
    deviation_S = (squares_S / (num_samples_S - 1).clamp(min=1.0)).sqrt()
    return torch.where(deviation_S > _SMALLEST_DEVIATION, centered_S / deviation_S, centered_S)


def _sums_in_groups(values_S: torch.Tensor, samples: GroupSamples) -> torch.Tensor:
    is_real_S = samples.group_ids_S >= 0
    slots_S = torch.where(is_real_S, samples.group_ids_S + 1, 0)
    terms_S = torch.where(is_real_S, values_S * samples.multiplicity_S, 0.0)
    size = int(slots_S.max()) + 1 if len(slots_S) else 1
    sums = torch.zeros(size, dtype=torch.float64, device=values_S.device).index_add(0, slots_S, terms_S)
    return sums[slots_S]
