"""Self-certainty (Intuitor, arXiv 2505.19590): reward an answer by the distance of its tokens from uniform.

    u(y) = 1/|y| sum_t KL(U || p(.|x, y_<t)) = 1/|y| sum_t [logsumexp_v z_v - mean_v z_v - log V]

loss = - sum_y sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t, with A the reward u minus the mean of
its question, divided by the standard deviation (GRPO). U is uniform over the vocabulary of V tokens. p is taken
at the trained temperature; the authors sample and score at T = 1 and hold the policy to a frozen reference with a
KL term of 0.005, while `algorithm.kl` here holds it to the policy that sampled.
"""

from rlsc_mcore.algorithm.pass_reward import PassReward


class SelfCertainty(PassReward):
    """Reward an answer by the mean of KL(U || p) over its tokens."""

    pass_value = "self_certainty"
