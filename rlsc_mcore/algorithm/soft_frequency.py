"""Soft frequency with an outcome mask (OM-GRPO, arXiv 2608.03119): reward agreement, do not train the answer
itself.

    u(y) = share of the question's samples with the same answer as y, 0 without an answer in a box

loss = - sum_y sum_{t outside the box} min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl k3_t, with A the reward u
minus the mean of its question, divided by the standard deviation (GRPO). The tokens inside the last box get no
gradient: in label-free training the collapse onto one answer sits in them. The authors add a format reward; here
a sample without a box has reward 0.
"""

from rlsc_mcore.algorithm.group_reward import GroupReward


class SoftFrequency(GroupReward):
    """Weight each sample by its advantage; `masks_box` of the objective table masks the box."""
