"""Self-SFT: loss = - sum_y log p(y|x) over the model's own samples, each with weight 1.

With log p at the sampling temperature the gradient is zero in expectation. This is the control for objectives
with other weights.
"""

from rlsc_mcore.algorithm.rule import ObjectiveRule


class SelfSft(ObjectiveRule):
    """Give every sample weight 1."""
