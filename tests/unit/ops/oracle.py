"""What the ops must compute, by other means: plain log_softmax and autograd, in float64 (exact) or the
inputs' dtype (eager)."""

from itertools import pairwise

import torch
from torch import Tensor


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """log softmax at the target and the row's entropy, float32 or float64 [T]; 0 for negative targets."""
    x = logits[:, :vocab_size]
    log_p = torch.log_softmax((x if x.dtype == torch.float64 else x.float()) / temperature, dim=1)
    live = targets >= 0
    chosen = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    entropy = -torch.where(log_p > float("-inf"), log_p.exp() * log_p.clamp_min(-1e30), 0.0).sum(dim=1)
    return torch.where(live, chosen, 0.0), torch.where(live, entropy, 0.0)


def gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy_weights: Tensor,
    *,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, entropy, gradient of their weighted sum with respect to the logits) in the logits' dtype."""
    leaf = logits.detach().clone().requires_grad_()
    log_p, entropy = log_probs_and_entropy(leaf, targets, temperature=temperature, vocab_size=vocab_size)
    (log_p * weights.to(log_p.dtype) + entropy * entropy_weights.to(log_p.dtype)).sum().backward()
    assert leaf.grad is not None
    return log_p.detach(), entropy.detach(), leaf.grad


def head_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, temperature: float, vocab_size: int
) -> Tensor:
    """log p of the masked-in tokens with all logits at once, 0 elsewhere."""
    logits = hidden @ weight.t()
    log_p, _ = log_probs_and_entropy(logits, targets, temperature=temperature, vocab_size=vocab_size)
    return log_p * mask


def sequence_weights(log_p: Tensor, mask: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """A float64 coefficient per token that needs the whole sequence: exp(mean log p) + alpha, in a Python
    loop."""
    weights = torch.zeros(log_p.shape[0], dtype=torch.float64)
    bounds = cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        live = mask[start:stop]
        if int(live.sum()):
            weights[start:stop] = torch.exp(log_p[start:stop][live].double().mean()) + alpha
    return weights
