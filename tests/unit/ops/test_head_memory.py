"""Memory of the fused head: at full size without data, and measured in a small call. Logits stay one
chunk."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsc_mcore.ops import linear_token_log_probs, linear_weighted_loss

MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, torch.Tensor)
                and id(storage := leaf.untyped_storage()) not in before | self.known
            ):
                self.add(storage)
        return out

    def add(self, storage):
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


def ones(log_p, mask, cu_seqlens, sequences):
    return torch.ones_like(log_p)


def weighted_loss(
    num_sequences,
    length,
    hidden_size,
    vocab,
    *,
    chunk_tokens,
    live_share=1.0,
    dtype=torch.bfloat16,
    device="cpu",
):
    """Run forward and backward; return what was alive at the peak beside the inputs."""
    num_tokens, live = num_sequences * length, int(length * live_share)
    hidden = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(vocab, hidden_size, dtype=dtype, device=device, requires_grad=True)
    mask = (torch.arange(num_tokens, device=device) % length) >= length - live
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device)
    targets = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    with LiveBytes() as memory:
        loss, _ = linear_weighted_loss(
            hidden, weight, targets, mask_T=mask, cu_seqlens=cu_seqlens, coefficient_fn=ones, vocab_size=vocab,
            chunk_tokens=chunk_tokens, live_counts=[live] * num_sequences,
        )  # fmt: skip
        loss.backward()
    assert hidden.grad is not None
    return memory


def test_a_qwen2_7b_step_of_16_x_3072_tokens_stays_under_one_and_a_half_gib_beside_its_gradients():
    """V = 152064: all logits in bf16 would be 13.9 GiB, and their float32 copy twice that. Runs on shapes
    alone, which also shows that nothing waits for a value on the device: a meta tensor has none."""
    num_tokens, hidden_size, vocab, chunk = 16 * 3072, 3584, 152064, 3072
    memory = weighted_loss(16, 3072, hidden_size, vocab, chunk_tokens=chunk, device="meta")
    gradients = num_tokens * hidden_size * 2 + vocab * hidden_size * 4
    assert chunk * vocab * 2 < memory.peak - gradients < 1.5 * 1024 * MIB
    assert memory.largest == vocab * hidden_size * 4, "the weight's gradient is the largest tensor"


@pytest.mark.parametrize("num_sequences", [4, 8, 16])
def test_the_peak_beside_the_gradients_does_not_grow_with_the_tokens(num_sequences):
    length, hidden_size, vocab, chunk = 32, 16, 4096, 32
    memory = weighted_loss(num_sequences, length, hidden_size, vocab, chunk_tokens=chunk, dtype=torch.float32)
    per_token = num_sequences * length * (hidden_size * 4 * 2 + 64)
    gradients = vocab * hidden_size * 4 * 2
    assert memory.peak - gradients - per_token < 1.5 * chunk * vocab * 4


def test_masked_tokens_take_no_part_of_the_workspace():
    sizes = dict(
        num_sequences=2, length=64, hidden_size=16, vocab=4096, chunk_tokens=128, dtype=torch.float32
    )
    full, half = weighted_loss(**sizes), weighted_loss(**sizes, live_share=0.25)
    assert full.largest == 128 * 4096 * 4
    assert half.largest == 32 * 4096 * 4


def test_scoring_keeps_one_chunk_of_logits():
    hidden, weight = torch.zeros(512, 16), torch.zeros(4096, 16)
    targets, mask = torch.zeros(512, dtype=torch.int64), torch.ones(512, dtype=torch.bool)
    with LiveBytes() as memory, torch.no_grad():
        linear_token_log_probs(hidden, weight, targets, mask_T=mask, vocab_size=4096, chunk_tokens=32)
    assert memory.largest == 32 * 4096 * 4
    assert memory.peak < 1.2 * memory.largest
