"""Self-SFT: loss = - sum_y log p(y|x) over the model's own samples, every one with weight 1.

With log p at the sampling temperature the gradient is zero in expectation: the control against which a weight
must show its worth.
"""

from rlsc_mcore.algorithm.rule import ObjectiveRule


class SelfSft(ObjectiveRule):
    """Give every sample the weight 1."""
