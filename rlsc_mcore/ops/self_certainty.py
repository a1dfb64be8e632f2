"""Compute the self-certainty of tokens, KL(U || p), from hidden states and log-probs that were computed
before.

U is uniform over the V vocabulary columns, z = hidden weight^T / temperature, y is the target:

    KL(U || p) = -log V - mean_v log p_v
               = logsumexp(z) - mean_v z_v - log V
               = z_y - mean_v z_v - log p_y - log V

The mean of the logits is the product with one row, the mean of the weight's rows, so no logits are computed:
a token costs two rows of the hidden size.

Shape suffixes: T all tokens, N live tokens (those in the mask), C tokens of a piece, H hidden size, Vp
vocabulary rows of this rank with padding.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rlsc_mcore.ops.chunks import live_tokens, pieces_of
from rlsc_mcore.ops.head import check_head, gather_hidden
from rlsc_mcore.ops.reference import working_dtype
from rlsc_mcore.ops.shard import VocabShard

_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def linear_self_certainty(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    target_ids_T: Tensor,
    log_probs_T: Tensor,
    *,
    mask_T: Tensor,
    num_live: int,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Return KL(U || p) of each token in nats, 0 outside the mask: float32 [T] (float64 for float64 inputs).

    The arguments are those of `linear_token_log_probs`, and `log_probs_T` is its result. `num_live` counts
    the tokens of the mask. Without gradients. Collectives over `group`: one all-gather of hidden under
    sequence parallelism, and one all-reduce of 4 bytes per token of the mask.
    """
    check_head(hidden_TH, weight_VpH, target_ids_T, mask_T, vocab_start, group, sequence_parallel)
    shard = VocabShard.of(weight_VpH.shape[0], vocab_size, vocab_start, temperature)
    dtype = working_dtype(hidden_TH.dtype)
    hidden_full_TH = gather_hidden(hidden_TH, group, sequence_parallel)
    live_N = live_tokens(mask_T, None, [num_live]).positions
    column_N = target_ids_T[live_N] - shard.start
    owned_N = (column_N >= 0) & (column_N < shard.num_columns)
    column_N = torch.where(owned_N, column_N, 0)
    mean_row_H = weight_VpH[: shard.num_columns].sum(0, dtype=dtype) / vocab_size
    above_mean_N = torch.empty(num_live, dtype=dtype, device=hidden_TH.device)
    for start, stop in pieces_of(0, num_live, _TOKENS_AT_ONCE):
        hidden_CH = hidden_full_TH[live_N[start:stop]].to(dtype)
        target_CH = weight_VpH[column_N[start:stop]].to(dtype) * owned_N[start:stop, None]
        above_mean_N[start:stop] = (hidden_CH * (target_CH - mean_row_H)).sum(1)
    if group is not None and group.size() > 1:
        dist.all_reduce(above_mean_N, group=group)
    certainty_N = above_mean_N * shard.inv_temperature - log_probs_T[live_N] - math.log(vocab_size)
    return torch.zeros_like(log_probs_T).index_copy_(0, live_N, certainty_N.to(log_probs_T.dtype))
