"""Provide weighted token log-probs from logits by this engine and by the installed peers, all with the same
two calls."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_harness import UnavailableError
from rlsc_mcore.ops import library  # noqa: F401  registers torch.ops.rlsc
from rlsc_mcore.ops.dispatch import OFFERS, choose, why_not

IGNORED = -100  # the ignore_index of the peers


class Provider(NamedTuple):
    """Two calls, either of which may be None: `forward(logits, targets) -> log p` and `step(logits, targets,
    weights) -> (log p, dlogits)`."""

    name: str
    forward: Callable[[Tensor, Tensor], Tensor] | None
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    overwrites: bool = False  # step writes the gradient over the logits
    tolerance: float = 0.1  # of log p; peers in bf16 are 0.06 off


def from_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor], *, overwrites: bool = False) -> Provider:
    """Make a provider of a peer that returns per-token losses and has a backward pass."""

    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return -loss(logits, targets).float().reshape(-1)

    def step(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        losses = loss(leaf, targets).reshape(-1)
        losses.backward((-weights).to(losses.dtype))
        assert leaf.grad is not None
        return -losses.detach().float(), leaf.grad

    return Provider(name, forward, step, overwrites)


def ours(backend: str, device: torch.device) -> Provider:
    """Make this engine's provider: `step` is one pass with known weights, `forward` reads the logits once for
    log p alone."""
    if backend != "auto":
        for op in OFFERS[backend]:
            if (reason := why_not(backend, op, device.type)) is not None:
                raise UnavailableError(reason)

    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.ops.rlsc.scored_stats(logits, targets, 1.0, 0, logits.shape[1], False, backend)[1]

    def step(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.rlsc.log_prob_dlogits_(
            logits, targets, weights, 1.0, 0, logits.shape[1], backend
        ), logits

    taken = f" ({choose('log_prob_dlogits_', device.type).backend})" if backend == "auto" else ""
    return Provider(
        f"ours {backend}{taken}",
        forward if "log_prob_stats" in OFFERS.get(backend, ("log_prob_stats",)) else None,
        step,
        True,
        1e-4,
    )


def eager_float32() -> Provider:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.float(), dim=-1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
        return torch.where(targets >= 0, -log_p, 0.0)

    return from_loss("torch eager float32", loss)


def cross_entropy() -> Provider:
    return from_loss(
        "F.cross_entropy",
        lambda x, t: torch.nn.functional.cross_entropy(x, t, reduction="none", ignore_index=IGNORED),
    )


def compiled() -> Provider:
    @torch.compile(dynamic=False)
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, reduction="none", ignore_index=IGNORED
        )

    return from_loss("torch.compile", loss)


def liger() -> Provider:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        result: Any = liger_cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        return result[0] if isinstance(result, tuple) else result

    return from_loss("Liger", loss, overwrites=True)


def quack() -> Provider:
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    return from_loss("QuACK", lambda x, t: quack_cross_entropy(x, t, ignore_index=IGNORED, reduction="none"))


def megatron() -> Provider:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = single_rank_group()

    def loss(
        logits: Tensor, targets: Tensor
    ) -> Tensor:  # it accepts no ignored tokens and may overwrite its input
        losses = fused_vocab_parallel_cross_entropy(
            logits[:, None].clone(), targets.clamp_min(0)[:, None], group
        )
        return torch.where(targets >= 0, losses[:, 0], 0.0)

    return from_loss("Megatron-Core", loss)


def transformer_engine() -> Provider:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return parallel_cross_entropy(logits[None], targets[None], 0.0, False, None, IGNORED)

    return from_loss("TransformerEngine", loss, overwrites=True)


def single_rank_group() -> Any:
    """Return a process group of this process alone; Megatron's vocab-parallel loss needs one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def providers(device: torch.device) -> dict[str, Callable[[], Provider]]:
    """Return the builders of all providers by name. A missing peer or a builder that raises is reported and
    not fatal."""
    names = ("auto", "cuda", "triton") if device.type == "cuda" else ("auto",)
    peers = {
        "torch eager float32": eager_float32,
        "F.cross_entropy": cross_entropy,
        "torch.compile": compiled,
        "Liger": liger,
        "QuACK": quack,
        "Megatron-Core": megatron,
        "TransformerEngine": transformer_engine,
    }
    return {f"ours {name}": partial(ours, name, device) for name in ("reference", *names)} | peers
