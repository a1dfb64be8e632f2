"""The ops on 1, 2 and 4 ranks against one rank: values, gradients, and the collectives that a call makes."""

import pytest
import torch
import torch.distributed as dist

from rlsc_mcore.ops import (
    linear_kl_loss,
    linear_token_log_probs,
    linear_weighted_loss,
    sequence_sums,
    token_log_probs,
)
from rlsc_mcore.ops.sequence_sums import per_token
from tests.helpers.ranks import run_ranks
from tests.unit.ops.batches import HIDDEN, VOCAB, make
from tests.unit.ops.tolerances import HEAD_SLACK, SHARDED, assert_close

TEMPERATURE = 0.7


def coefficients(log_p, mask, cu_seqlens, sequences):
    counts = cu_seqlens.diff().clamp_min(1)
    return per_token(
        (sequence_sums(log_p, mask, cu_seqlens) / counts).exp() + 0.1, cu_seqlens, log_p.shape[0]
    )


class Shard:
    """A rank's rows of the weight and columns of the logits: VOCAB = 211 does not divide, the last rank has
    more padding."""

    def __init__(self, batch, group):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        columns = -(-VOCAB // self.size) + 3
        self.start = self.rank * columns
        self.num_columns = max(0, min(columns, VOCAB - self.start))
        self.weight = torch.full((columns, HIDDEN), 9.0, dtype=batch.weight.dtype)
        self.weight[: self.num_columns] = batch.weight[self.start : self.start + self.num_columns]
        self.arguments = dict(vocab_size=VOCAB, vocab_start=self.start, group=group, temperature=TEMPERATURE)

    def columns_of(self, whole):
        return whole[self.start : self.start + self.num_columns]

    def rows_of(self, whole, sequence_parallel):
        return whole.chunk(self.size)[self.rank] if sequence_parallel else whole


class CountedCollectives:
    """The calls that the ops make of torch.distributed, and their bytes per rank."""

    NAMES = (
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_reduce",
        "broadcast",
        "all_gather",
        "all_to_all_single",
    )

    def __enter__(self):
        self.calls, self.originals = [], {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(dist, name, self.counting(name, original))
        return self

    def counting(self, name, original):
        def call(*arguments, **options):
            sent = arguments[0] if name == "all_reduce" else arguments[1]
            self.calls.append((name, sent.numel() * sent.element_size()))
            return original(*arguments, **options)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def join_ranks():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.group.WORLD


def rank_token_log_probs():
    group = join_ranks()
    batch = make(torch.float64)
    shard = Shard(batch, group)
    logits = batch.hidden @ batch.weight.t()
    targets = torch.where(batch.mask, batch.targets, -1)
    w, v = torch.randn(2, targets.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def run(x, **options):
        leaf = x.clone().requires_grad_()
        log_p, entropy = token_log_probs(leaf, targets, with_entropy=True, **options)
        (log_p * w + entropy * v).sum().backward()
        return log_p.detach(), entropy.detach(), leaf.grad

    whole = run(logits, vocab_size=VOCAB, temperature=TEMPERATURE)
    with CountedCollectives() as counted:
        ours = run(batch.hidden @ shard.weight.t(), **shard.arguments)
    assert_close(ours[0], whole[0], SHARDED, "log p")
    assert_close(ours[1], whole[1], SHARDED, "entropy")
    assert_close(
        ours[2][:, : shard.num_columns], shard.columns_of(whole[2][:, :VOCAB].t()).t(), SHARDED, "gradient"
    )
    assert not ours[2][:, shard.num_columns :].any()
    expected = [("all_gather_into_tensor", targets.shape[0] * 4 * 8)] if group.size() > 1 else []
    assert counted.calls == expected, counted.calls
    return True


def rank_head(dtype_name, sequence_parallel, chunk_tokens):
    group = join_ranks()
    dtype = getattr(torch, dtype_name)
    batch = make(dtype)
    shard = Shard(batch, group)
    upstream, entropy_upstream = torch.randn(
        2, batch.targets.shape[0], generator=torch.Generator().manual_seed(5)
    )

    def log_probs(hidden, weight, **options):
        log_p, entropy = linear_token_log_probs(
            hidden, weight, batch.targets, mask_T=batch.mask, with_entropy=True, **options
        )
        return (log_p * upstream + entropy * entropy_upstream).sum(), log_p

    def weighted(hidden, weight, **options):
        return linear_weighted_loss(
            hidden,
            weight,
            batch.targets,
            mask_T=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            coefficient_fn=coefficients,
            **options,
        )

    for call in (log_probs, weighted):
        hidden, weight = (value.double().requires_grad_() for value in (batch.hidden, batch.weight))
        whole = [*call(hidden, weight, vocab_size=VOCAB, temperature=TEMPERATURE)]
        whole += torch.autograd.grad(whole[0], (hidden, weight))
        hidden, weight = (
            shard.rows_of(batch.hidden, sequence_parallel).clone().requires_grad_(),
            shard.weight.clone().requires_grad_(),
        )
        ours = [
            *call(
                hidden,
                weight,
                **shard.arguments,
                sequence_parallel=sequence_parallel,
                chunk_tokens=chunk_tokens,
            )
        ]
        ours += torch.autograd.grad(ours[0], (hidden, weight))
        assert not ours[3][shard.num_columns :].any()
        pairs = {
            "loss": (ours[0], whole[0]),
            "log p": (ours[1], whole[1]),
            "d hidden": (ours[2], shard.rows_of(whole[2], sequence_parallel)),
            "d weight": (ours[3][: shard.num_columns], shard.columns_of(whole[3][:VOCAB])),
        }
        slack = SHARDED if dtype == torch.float64 else 4 * HEAD_SLACK[dtype]
        for name, (got, expected) in pairs.items():
            assert_close(
                got, expected, slack * (1 + whole[2].abs().max() + expected.abs()), f"{call.__name__} {name}"
            )
    return float(ours[0]), ours[1].tolist()


def rank_count_collectives(sequence_parallel):
    """One gather of 12 bytes per live token and chunk; nothing in backward but what the hidden states
    need."""
    group = join_ranks()
    batch = make(torch.float32)
    shard = Shard(batch, group)
    hidden = shard.rows_of(batch.hidden, sequence_parallel).clone().requires_grad_()
    with CountedCollectives() as forward:
        loss, _ = linear_weighted_loss(
            hidden, shard.weight.requires_grad_(), batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens,
            coefficient_fn=coefficients, sequence_parallel=sequence_parallel, chunk_tokens=30, **shard.arguments,
        )  # fmt: skip
    with CountedCollectives() as backward:
        loss.backward()
    return forward.calls, backward.calls, batch.live_counts


def kl_loss(batch, hidden, weight, beta, **options):
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(int(batch.mask.sum()), HIDDEN, dtype=torch.float64, generator=generator)
    coefficients_T = torch.randn(len(batch.mask), dtype=torch.float64, generator=generator)
    teacher = teacher + batch.hidden[batch.mask].double()
    return linear_kl_loss(
        hidden, teacher.to(hidden.dtype), weight, coefficients_T=coefficients_T, mask_T=batch.mask, beta=beta, **options
    )  # fmt: skip


def rank_kl_head(dtype_name, beta, sequence_parallel, chunk_tokens):
    group = join_ranks()
    dtype = getattr(torch, dtype_name)
    batch = make(dtype)
    shard = Shard(batch, group)
    hidden, weight = (value.double().requires_grad_() for value in (batch.hidden, batch.weight))
    whole = [*kl_loss(batch, hidden, weight, beta, vocab_size=VOCAB, temperature=TEMPERATURE)]
    whole += torch.autograd.grad(whole[0], (hidden, weight))
    hidden = shard.rows_of(batch.hidden, sequence_parallel).clone().requires_grad_()
    weight = shard.weight.clone().requires_grad_()
    ours = [
        *kl_loss(
            batch, hidden, weight, beta, sequence_parallel=sequence_parallel, chunk_tokens=chunk_tokens, **shard.arguments
        )
    ]  # fmt: skip
    ours += torch.autograd.grad(ours[0], (hidden, weight))
    assert not ours[3][shard.num_columns :].any()
    pairs = {
        "loss": (ours[0], whole[0]),
        "divergence": (ours[1], whole[1]),
        "d hidden": (ours[2], shard.rows_of(whole[2], sequence_parallel)),
        "d weight": (ours[3][: shard.num_columns], shard.columns_of(whole[3][:VOCAB])),
    }
    slack = SHARDED if dtype == torch.float64 else 4 * HEAD_SLACK[dtype]
    for name, (got, expected) in pairs.items():
        assert_close(got, expected, slack * (1 + whole[2].abs().max() + expected.abs()), name)
    return float(ours[0]), ours[1].tolist()


def rank_count_kl_collectives(beta, sequence_parallel):
    group = join_ranks()
    batch = make(torch.float32)
    shard = Shard(batch, group)
    hidden = shard.rows_of(batch.hidden, sequence_parallel).clone().requires_grad_()
    with CountedCollectives() as forward:
        loss, _ = kl_loss(
            batch, hidden, shard.weight.requires_grad_(), beta, sequence_parallel=sequence_parallel, chunk_tokens=16,
            **shard.arguments,
        )  # fmt: skip
    with CountedCollectives() as backward:
        loss.backward()
    return forward.calls, backward.calls


def rank_whole_vocabulary():
    """Logits that were gathered before the call, and given with the group: the mass would count once per
    rank."""
    group = join_ranks()
    batch = make(torch.float32)
    arguments = dict(vocab_size=VOCAB, vocab_start=0, group=group)
    calls = [
        lambda: token_log_probs(batch.hidden @ batch.weight.t(), batch.targets, **arguments),
        lambda: linear_token_log_probs(batch.hidden, batch.weight, batch.targets, mask_T=batch.mask, **arguments),
        lambda: linear_weighted_loss(
            batch.hidden, batch.weight, batch.targets, mask_T=batch.mask, cu_seqlens=batch.cu_seqlens,
            coefficient_fn=coefficients, **arguments,
        ),
    ]  # fmt: skip
    messages = []
    for call in calls if group.rank() > 0 else []:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_one_rank_s_whole_logits_are_refused_under_a_group():
    first, second = run_ranks(2, rank_whole_vocabulary)
    assert first == []
    assert len(second) == 3
    assert all(
        "vocab_start: expected this rank's first column, got 0 on rank 1 of 2" in message
        for message in second
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_token_log_probs_of_shards_are_those_of_the_whole(world_size):
    assert run_ranks(world_size, rank_token_log_probs) == [True] * world_size


@pytest.mark.parametrize(
    ("world_size", "dtype", "sequence_parallel", "chunk_tokens"),
    [
        (2, "float64", False, 13),
        (2, "float32", True, 13),
        (2, "bfloat16", True, 64),
        (4, "float64", True, 30),
        (4, "float32", False, 4),
    ],
)
def test_the_fused_head_of_shards_is_that_of_the_whole(world_size, dtype, sequence_parallel, chunk_tokens):
    results = run_ranks(world_size, rank_head, dtype, sequence_parallel, chunk_tokens)
    assert all(result == results[0] for result in results), "every rank returns the same bits"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_collective_of_twelve_bytes_per_token_and_chunk(sequence_parallel):
    for forward, backward, live_counts in run_ranks(2, rank_count_collectives, sequence_parallel):
        tokens = len(make(torch.float32).targets) * HIDDEN * 4
        gathers = [size for name, size in forward if name == "all_gather_into_tensor" and size % (HIDDEN * 4)]
        assert sum(live_counts) == 14 + 24 + 8
        assert gathers == [12 * 14, 12 * 24, 12 * 8], "three chunks of whole sequences"
        hidden = (
            [("all_gather_into_tensor", tokens // 2), ("reduce_scatter_tensor", tokens)]
            if sequence_parallel
            else [("all_reduce", tokens)]
        )
        assert [call for call in forward if call[1] not in gathers] == hidden
        assert backward == []


@pytest.mark.parametrize(
    ("world_size", "dtype", "beta", "sequence_parallel", "chunk_tokens"),
    [
        (1, "float64", 0.0, False, 13),
        (2, "float64", 0.0, False, 13),
        (2, "float64", 0.5, True, 13),
        (2, "bfloat16", 0.0, True, 64),
        (4, "float64", 0.3, True, 30),
        (4, "float32", 0.0, False, 7),
    ],
)
def test_the_kl_loss_of_shards_is_that_of_the_whole(world_size, dtype, beta, sequence_parallel, chunk_tokens):
    results = run_ranks(world_size, rank_kl_head, dtype, beta, sequence_parallel, chunk_tokens)
    assert all(result == results[0] for result in results), "every rank returns the same bits"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.0, [20 * 16, 20 * 16, 20 * 14]), (0.5, [20 * 16, 20 * 16 + 8 * 16, 20 * 14 + 8 * 16, 8 * 14])],
)
def test_one_collective_per_chunk_of_the_kl_loss(beta, expected, sequence_parallel):
    """46 tokens in 3 chunks. The sums of the JSD travel with the statistics of the next chunk."""
    batch = make(torch.float32)
    whole = len(batch.targets) * HIDDEN * 4
    for forward, backward in run_ranks(2, rank_count_kl_collectives, beta, sequence_parallel):
        of_hidden = (
            [("all_gather_into_tensor", whole // 2), ("reduce_scatter_tensor", whole)]
            if sequence_parallel
            else [("all_reduce", whole)]
        )
        assert [call for call in forward if call in of_hidden] == of_hidden
        assert [size for name, size in forward if (name, size) not in of_hidden] == expected
        assert backward == []
