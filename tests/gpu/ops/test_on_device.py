"""What only a GPU can show: no host sync, CUDA graphs, offsets beyond 2^31, real widths, and the memory of a
real step."""

import pytest
import torch

from rlsc_mcore.ops import linear_token_log_probs, linear_weighted_loss, sequence_sums, token_log_probs
from rlsc_mcore.ops.dispatch import why_not
from rlsc_mcore.ops.sequence_sums import per_token
from tests.unit.ops.batches import VOCAB, make, to
from tests.unit.ops.tolerances import assert_close, gradient_allowance

DEVICE = torch.device("cuda")
BACKENDS = ["auto", "triton", "cuda"]
GIB = 1 << 30


def need(backend):
    if backend == "cuda" and (reason := why_not("cuda", "rest_softmax_", "cuda")) is not None:
        pytest.skip(reason)


def coefficients(log_p, mask, cu_seqlens, sequences):
    sums = sequence_sums(log_p, mask, cu_seqlens)
    return per_token((sums / cu_seqlens.diff().clamp_min(1)).exp() + 0.1, cu_seqlens, log_p.shape[0])


def loss_of(batch, live_counts, backend="auto", **options):
    return linear_weighted_loss(
        batch.hidden, batch.weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens, coefficient_fn=coefficients,
        vocab_size=VOCAB, live_counts=live_counts, backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_host(backend):
    """Logits op, both fused heads and the sums, forward and backward, in CUDA's sync debug mode."""
    need(backend)
    cpu_batch = make(torch.bfloat16)
    counts, batch = cpu_batch.live_counts, to(cpu_batch, DEVICE)
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_()
    logits = torch.randn(64, VOCAB, device=DEVICE, requires_grad=True)

    def step():
        loss, log_p = loss_of(batch, counts, backend, chunk_tokens=20)
        loss.backward()
        scored = linear_token_log_probs(
            batch.hidden,
            batch.weight,
            batch.targets,
            mask_T=batch.mask,
            vocab_size=VOCAB,
            num_live=sum(counts),
            backend=backend,
        )
        sequence_sums(scored, batch.mask, batch.cu_seqlens, backend=backend).sum().backward()
        token_log_probs(logits, batch.targets, vocab_size=VOCAB, backend=backend).sum().backward()
        return log_p

    step()  # compile and load outside of the check
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_replays_with_new_logits(backend):
    need(backend)
    targets = torch.arange(16, device=DEVICE)
    static, weights = torch.zeros(16, 4099, device=DEVICE), torch.linspace(-1, 1, 16, device=DEVICE)

    def run():
        return torch.ops.rlsc.log_prob_dlogits_(static, targets, weights, 1.0, 0, 4099, backend)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits = torch.randn(16, 4099, device=DEVICE)
    static.copy_(logits)
    graph.replay()
    exact = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0]
    assert_close(captured, exact, 5e-6, "log p")


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_two_to_the_31(backend):
    """16384 x 152064 logits are 2.49e9 elements: the last rows against float64."""
    need(backend)
    num_rows, vocab = 16384, 152064
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(num_rows, vocab, dtype=torch.bfloat16, device=DEVICE).normal_(
        0, 2, generator=generator
    )
    targets = torch.randint(0, vocab, (num_rows,), device=DEVICE, generator=generator)
    weights = torch.randn(num_rows, device=DEVICE, generator=generator)
    last = logits[-16:].double()
    log_p = torch.ops.rlsc.log_prob_dlogits_(logits, targets, weights, 1.0, 0, vocab, backend)
    exact = torch.log_softmax(last, 1)
    assert_close(log_p[-16:], exact.gather(1, targets[-16:, None])[:, 0], 5e-6, "log p")
    grad = (torch.nn.functional.one_hot(targets[-16:], vocab) - exact.exp()) * weights[-16:, None]
    assert_close(
        logits[-16:],
        grad,
        gradient_allowance(grad, torch.bfloat16, float(weights.abs().max())) * 1.01,
        "gradient",
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [19008, 151936, 152064, 152067])
def test_real_widths(backend, dtype, vocab):
    """One block, clusters of several, a tail that fills no vector; many more rows than blocks, a third of
    them ignored."""
    need(backend)
    num_rows = 700
    generator = torch.Generator(DEVICE).manual_seed(1)
    columns = (vocab + 7) // 8 * 8
    logits = torch.empty(num_rows, columns, dtype=dtype, device=DEVICE).normal_(0, 2, generator=generator)
    targets = torch.randint(0, vocab, (num_rows,), device=DEVICE, generator=generator)
    targets[0], targets[1] = 0, vocab - 1
    targets[2::3] = -1
    weights = torch.randn(num_rows, device=DEVICE, generator=generator)
    live, exact = targets >= 0, torch.log_softmax(logits[:, :vocab].float(), 1).double()
    log_p = torch.ops.rlsc.log_prob_dlogits_(logits, targets, weights, 1.0, 0, vocab, backend)
    expected = torch.where(live, exact.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)
    assert_close(log_p, expected, 1e-5, "log p")
    grad = (torch.nn.functional.one_hot(targets.clamp_min(0), vocab) - exact.exp()) * (weights * live)[
        :, None
    ]
    assert_close(
        logits[:, :vocab], grad, gradient_allowance(grad, dtype, 4.0) + 1e-5 * grad.abs().cpu(), "gradient"
    )
    assert not logits[~live].any()
    assert not logits[:, vocab:].any()


def test_a_real_step_stays_under_one_and_a_half_gib_beside_its_gradients():
    """16384 tokens of a 7B model's head."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * GIB:
        pytest.skip("needs 40 GiB of device memory")
    num_tokens, hidden_size, vocab, length = 16384, 3584, 152064, 2048
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size, device=DEVICE) / 30).bfloat16().requires_grad_()
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=DEVICE)
    mask = torch.ones(num_tokens, dtype=torch.bool, device=DEVICE)
    targets = torch.randint(0, vocab, (num_tokens,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_weighted_loss(
        hidden, weight, targets, mask_T=mask, cu_seqlens=cu_seqlens, coefficient_fn=coefficients, vocab_size=vocab,
        live_counts=[length] * (num_tokens // length),
    )  # fmt: skip
    forward_peak = torch.cuda.max_memory_allocated() - before
    gradients = num_tokens * hidden_size * 2 + vocab * hidden_size * 4
    assert forward_peak - gradients < 1.5 * GIB
    loss.backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
