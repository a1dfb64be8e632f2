"""Fused token log-probabilities and weighted losses of a language-model head: masked, vocab-parallel, and
exact where p -> 1."""

from rlsc_mcore.ops.dispatch import Choice, describe_backends
from rlsc_mcore.ops.linear_kl import linear_kl_loss
from rlsc_mcore.ops.linear_log_prob import linear_token_log_probs
from rlsc_mcore.ops.linear_loss import CoefficientFn, linear_weighted_loss
from rlsc_mcore.ops.log_prob import token_log_probs
from rlsc_mcore.ops.self_certainty import linear_self_certainty
from rlsc_mcore.ops.sequence_sums import sequence_sums

__all__ = [
    "Choice",
    "CoefficientFn",
    "describe_backends",
    "linear_kl_loss",
    "linear_self_certainty",
    "linear_token_log_probs",
    "linear_weighted_loss",
    "sequence_sums",
    "token_log_probs",
]
