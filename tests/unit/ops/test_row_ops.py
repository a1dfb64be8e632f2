"""The ops that overwrite logits, and the statistics joined over shards that are cut in one process."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlsc_mcore.ops import library  # noqa: F401  registers torch.ops.rlsc
from rlsc_mcore.ops.vocab_parallel import join, join_backward
from tests.unit.ops import oracle
from tests.unit.ops.conftest import Placement
from tests.unit.ops.rows import IGNORED, VOCAB, make, to
from tests.unit.ops.tolerances import SHARDED, assert_close, gradient_allowance, value_allowance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_weighted_gradient_in_one_pass(placement: Placement, dtype, temperature):
    rows = make(dtype)
    exact, _, grad = oracle.gradient(
        rows.logits[:, :VOCAB].double(),
        rows.targets,
        rows.weights,
        torch.zeros_like(rows.weights),
        temperature=temperature,
        vocab_size=VOCAB,
    )
    eager, _ = oracle.log_probs_and_entropy(
        rows.logits, rows.targets, temperature=temperature, vocab_size=VOCAB
    )
    here = to(rows, placement.device)
    log_p = torch.ops.rlsc.log_prob_dlogits_(
        here.logits, here.targets, here.weights, 1 / temperature, 0, VOCAB, placement.backend
    )
    assert_close(log_p, exact, value_allowance(eager, exact), "log p")
    largest = float(rows.weights.abs().max()) / temperature
    assert_close(
        here.logits[:, :VOCAB], grad, gradient_allowance(grad, dtype, largest) + 4e-6 * grad.abs(), "gradient"
    )
    assert not here.logits[here.targets == IGNORED].any()
    assert not here.logits[:, VOCAB:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rest_softmax_is_the_gradient_up_to_a_factor_per_row(placement: Placement, dtype):
    """softmax of the row without its target; row * -(1 - p) w / temperature is the gradient, so the factor
    may come later."""
    temperature, rows = 0.7, make(dtype)
    live = rows.targets >= 0
    x = rows.logits[:, :VOCAB].double() / temperature
    column = rows.targets.clamp_min(0)[:, None]
    expected = torch.softmax(x.scatter(1, column, float("-inf")), dim=1).scatter(1, column, -1.0)
    expected = torch.where(live[:, None], expected, 0.0)
    exact, _ = oracle.log_probs_and_entropy(
        rows.logits.double(), rows.targets, temperature=temperature, vocab_size=VOCAB
    )
    here = to(rows, placement.device)
    stats = torch.ops.rlsc.rest_softmax_(
        here.logits, here.targets, 1 / temperature, 0, VOCAB, placement.backend
    )
    joined = join(stats[None], 1 / temperature)
    assert_close(joined.log_probs_T, exact, value_allowance(exact, exact) + 1e-5 * exact.abs(), "log p")
    assert_close(
        here.logits[:, :VOCAB],
        expected,
        gradient_allowance(expected, dtype, 1.0) + 1e-5 * expected.abs(),
        "rest softmax",
    )
    owned = here.logits[live.to(placement.device)].gather(1, here.targets[live.to(placement.device)][:, None])
    assert bool((owned == -1).all()), "the target's element is exactly -1"
    assert not here.logits[here.targets == IGNORED].any()
    assert not here.logits[:, VOCAB:].any()


@pytest.mark.parametrize("vocab", [19008, 40003])
def test_wide_rows_beyond_one_program(placement: Placement, vocab):
    """Qwen2.5's eighth of a vocabulary, and a row that one Triton program cannot hold; the row starts at any
    column id."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, vocab, generator=generator) * 3
    targets, weights, start = torch.tensor([1000 + vocab - 1, 1005]), torch.tensor([0.7, -1.3]), 1000
    shard = (1.0, start, vocab)
    exact, _, grad = oracle.gradient(
        logits.double(),
        targets - start,
        weights,
        torch.zeros_like(weights),
        temperature=1.0,
        vocab_size=vocab,
    )
    here = logits.to(placement.device)
    log_p = torch.ops.rlsc.log_prob_dlogits_(
        here, targets.to(placement.device), weights.to(placement.device), *shard, placement.backend
    )
    assert_close(log_p, exact, value_allowance(exact, exact), "log p")
    assert_close(here, grad, gradient_allowance(grad, torch.float32, 1.3), "gradient")


def test_threads_change_no_bit(placement: Placement):
    """Rows are shared among threads, a row never is."""
    rows, results = make(torch.bfloat16), []
    wide = rows.logits[:, :VOCAB].repeat(1, 20)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            here = wide.to(placement.device, copy=True)
            stats = torch.ops.rlsc.rest_softmax_(
                here, rows.targets.to(placement.device), 1.0, 0, wide.shape[1], placement.backend
            )
            results.append((stats, here))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 70), num_ranks=st.integers(1, 5), temperature=st.floats(0.3, 2.0))
def test_shards_cut_anywhere_join_to_the_whole(data, vocab, num_ranks, temperature):
    """Ranks without columns, without the target, with padding: values and gradients are those of the whole
    row."""
    cuts = sorted(data.draw(st.lists(st.integers(0, vocab), min_size=num_ranks - 1, max_size=num_ranks - 1)))
    bounds = [0, *cuts, vocab]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(6, vocab, generator=generator, dtype=torch.float64) * 5
    targets = torch.randint(0, vocab, (6,), generator=generator)
    targets[2] = IGNORED
    w, v = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    exact, entropy, grad = oracle.gradient(logits, targets, w, v, temperature=temperature, vocab_size=vocab)
    shards = []
    for start, stop in pairwise(bounds):
        padded = torch.cat(
            [logits[:, start:stop], torch.full((6, 2), float("nan"), dtype=torch.float64)], dim=1
        )
        shard = (1 / temperature, start, stop - start)
        shards.append((padded, shard, torch.ops.rlsc.log_prob_stats(padded, targets, *shard, True, "auto")))
    stats_RTk = torch.stack([stats for _, _, stats in shards])
    joined = join(stats_RTk, 1 / temperature)
    assert_close(joined.log_probs_T, exact, SHARDED, "log p")
    assert_close(joined.entropy_T, entropy, SHARDED, "entropy")
    pieces = []
    for rank, (padded, shard, stats) in enumerate(shards):
        grad_stats = join_backward(stats_RTk, rank, 1 / temperature, w, v)
        pieces.append(torch.ops.rlsc.dlogits(padded, grad_stats, stats, targets, *shard, "auto")[:, :-2])
    assert_close(torch.cat(pieces, dim=1), grad, SHARDED * 10, "gradient")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 5000),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
)
def test_compiled_rows_of_any_width_equal_the_definition(rows, vocab, seed, dtype):
    """Every remainder of the vector width and of the block."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * 6).to(dtype)
    targets = torch.randint(-1, vocab, (rows,), generator=generator)
    arguments = (targets, 1.0, 0, vocab)
    exact = torch.ops.rlsc.log_prob_stats(logits.double(), *arguments, True, "reference")
    got = torch.ops.rlsc.log_prob_stats(logits, *arguments, True, "auto")
    assert_close(got, exact, 4e-6 + 4e-6 * exact.abs().nan_to_num(0, 0, 0), "statistics")
    ours, theirs = logits.clone(), logits.double()
    torch.ops.rlsc.rest_softmax_(ours, *arguments, "auto")
    torch.ops.rlsc.rest_softmax_(theirs, *arguments, "reference")
    assert_close(ours, theirs, gradient_allowance(theirs, dtype, 1.0) + 1e-5 * theirs.abs(), "rest softmax")
