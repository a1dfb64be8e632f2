"""The operators as torch sees them: schemas and fakes pass opcheck, torch.compile traces through the
functions on them."""

import pytest
import torch

from rlsc_mcore.ops import token_log_probs
from rlsc_mcore.ops.reference import join_kl
from tests.unit.ops.conftest import Placement
from tests.unit.ops.tolerances import assert_close

SHARD = (1.25, 3, 37)  # 1 / temperature, first column's id, real columns


def arguments(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator).to(device)
    targets = torch.tensor([3, 39, 100, -1, 20], device=device)
    return logits, targets


def norms(logits, backend):
    """The normalisers of the rows and of the same rows in reverse order, [5, 4]."""
    stats = torch.ops.rlsc.kl_stats(logits, logits.flip(0).contiguous(), 1.25, 37, backend)
    return join_kl(stats[None], 1.25)[0]


CALLS = {
    "log_prob_stats": lambda x, t, b: (x, t, *SHARD, True, b),
    "scored_stats": lambda x, t, b: (x, t, *SHARD, True, b),
    "dlogits": lambda x, t, b: (
        x,
        torch.ones_like(x[:, :4]),
        torch.ops.rlsc.log_prob_stats(x, t, *SHARD, True, b),
        t,
        *SHARD,
        b,
    ),
    "dlogits_": lambda x, t, b: (
        x,
        torch.ones_like(x[:, :3]),
        torch.ops.rlsc.log_prob_stats(x, t, *SHARD, False, b),
        t,
        *SHARD,
        b,
    ),
    "rest_softmax_": lambda x, t, b: (x, t, *SHARD, b),
    "rest_softmax_into": lambda x, t, b: (x, x.bfloat16(), t, *SHARD, b),
    "log_prob_dlogits_": lambda x, t, b: (x, t, torch.linspace(-1, 1, 5, device=x.device), *SHARD, b),
    "join_stats": lambda x, t, b: (torch.stack([x[:, :3], x[:, 3:6]]).contiguous(), 1.25, b),
    "join_backward": lambda x, t, b: (
        torch.stack([x[:, :4], x[:, 4:8]]).contiguous(),
        1,
        1.25,
        x[:, 8].contiguous(),
        None,
        b,
    ),
    "kl_stats": lambda x, t, b: (x, x.flip(0).contiguous(), 1.25, 37, b),
    "jsd_stats": lambda x, t, b: (x, x.flip(0).contiguous(), norms(x, b), 1.25, 37, 0.5, b),
    "kl_dlogits_": lambda x, t, b: (
        x,
        x.flip(0).contiguous(),
        norms(x, b),
        torch.ones_like(x[:, 0]),
        torch.zeros_like(x[:, 0]),
        1.25,
        37,
        0.5,
        b,
    ),
    "sequence_sums": lambda x, t, b: (
        x[0].clone(),
        x[1] > 0,
        torch.tensor([0, 3, 3, 40], device=x.device).int(),
        b,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(placement: Placement, name):
    torch.library.opcheck(
        getattr(torch.ops.rlsc, name), CALLS[name](*arguments(placement.device), placement.backend)
    )


def test_compiled_without_a_graph_break_gives_the_same_gradient(placement: Placement):
    logits, targets = arguments(placement.device)

    def loss(logits):
        return token_log_probs(
            logits, targets.clamp(-1, 36), vocab_size=37, temperature=0.8, backend=placement.backend
        ).sum()

    def gradient(fn):
        leaf = logits.clone().requires_grad_()
        fn(leaf).backward()
        return leaf.grad

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(gradient(compiled), gradient(loss), 0.0, "gradient")
