"""Train with an objective of your own: `python examples/own_objective.py --config FILE --run-dir RUN`.

The rule below weighs each answer by the square root of its probability. Every option of `rlsc train` works.
"""

import sys

from rlsc_mcore.objectives import OBJECTIVES, Objective

# The configuration reads the table when it is imported, so the row comes before every other import.
OBJECTIVES["root"] = Objective(
    "root", "root confidence", "weight = sqrt(confidence)", rule="__main__:RootConfidence"
)

import torch  # noqa: E402

from rlsc_mcore.algorithm.confidence import log_confidence  # noqa: E402
from rlsc_mcore.algorithm.rule import ObjectiveRule, ScoredSequences  # noqa: E402
from rlsc_mcore.cli import main  # noqa: E402


class RootConfidence(ObjectiveRule):
    """loss = - sum_y sqrt(p(y|x)) log p(y|x), the weight not differentiated."""

    def sequence_weights(self, scored: ScoredSequences) -> torch.Tensor:
        """Return sqrt(p), float64 [S]."""
        log_probs_T, mask_T = scored.token_log_probs_T, scored.response_mask_T
        return (0.5 * log_confidence(log_probs_T, mask_T, scored.cu_seqlens, "sequence")).exp()


if __name__ == "__main__":
    main(["train", "--algorithm.objective", "root", *sys.argv[1:]])
