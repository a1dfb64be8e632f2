"""Time masked sums of packed sequences in float64: `python -m benchmarks.bench_sequence_sum`.

Peers: a float64 index_add (atomics on a GPU, so results differ between runs), torch.segment_reduce (the
reference), and a difference of cumulative sums. The floor is one read of values and mask; at these sizes a
kernel launch takes longer.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Task
from benchmarks.kernel_harness import Checks, KernelBenchmark
from rlsc_mcore.ops import sequence_sums


class Inputs(NamedTuple):
    values: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    sequence_T: Tensor  # which sequence a token belongs to


def make_inputs(num_tokens: int, num_sequences: int, device: torch.device) -> Inputs:
    """Return log-probs of sequences of different lengths, a quarter of them masked."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, num_tokens + 1, (num_sequences - 1,), generator=generator).sort().values
    cu_seqlens = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_tokens])]).int()
    values, mask = (
        -torch.rand(num_tokens, generator=generator),
        torch.rand(num_tokens, generator=generator) > 0.25,
    )
    sequence_T = torch.repeat_interleave(torch.arange(num_sequences), cu_seqlens.diff().long())
    return Inputs(*(tensor.to(device) for tensor in (values, mask, cu_seqlens, sequence_T)))


def index_add(x: Inputs) -> Tensor:
    sums = torch.zeros(x.cu_seqlens.shape[0] - 1, dtype=torch.float64, device=x.values.device)
    return sums.index_add_(0, x.sequence_T, torch.where(x.mask, x.values.double(), 0.0))


def cumulative(x: Inputs) -> Tensor:
    running = torch.where(x.mask, x.values.double(), 0.0).cumsum(0)
    return torch.cat([running.new_zeros(1), running])[x.cu_seqlens.long()].diff()


PROVIDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "ours": lambda x: sequence_sums(x.values, x.mask, x.cu_seqlens),
    "reference (segment_reduce)": lambda x: sequence_sums(
        x.values, x.mask, x.cu_seqlens, backend="reference"
    ),
    "index_add": index_add,
    "cumulative sum": cumulative,
}


def check(provider: Callable[[Inputs], Tensor], inputs: Inputs) -> Checks:
    """Compare with a float64 sum on the host; ValueError if it is wrong."""
    got = provider(inputs)
    host = torch.where(inputs.mask, inputs.values.double(), 0.0).cpu()
    bounds = inputs.cu_seqlens.tolist()
    exact = torch.stack([host[start:stop].sum() for start, stop in pairwise(bounds)])
    error = float((got.cpu() - exact).abs().max())
    if not error < 1e-8:
        raise ValueError(f"a sum is {error:.2g} off")
    return {"sum": error, "repeatable": all(torch.equal(got, provider(inputs)) for _ in range(5))}


def main() -> None:
    """Measure two sizes and write results/<device>/sequence_sum.json."""
    bench = KernelBenchmark(__doc__)
    for num_tokens, num_sequences in ((16384, 16), (49152, 64)):
        case = f"T={num_tokens} S={num_sequences}"
        inputs = make_inputs(num_tokens, num_sequences, bench.device)
        builders = {name: lambda provider=provider: provider for name, provider in PROVIDERS.items()}
        passed = bench.check(case, builders, lambda _, provider, inputs=inputs: check(provider, inputs))
        bench.time(
            case,
            {name: Task(partial(provider, inputs)) for name, (provider, _) in passed.items()},
            {name: checks for name, (_, checks) in passed.items()},
            flops=float(num_tokens),
            bytes_moved=5.0 * num_tokens,
        )
    rate = bench.ceilings.read_bytes_per_s
    bench.finish(__file__, "reference (segment_reduce)", lambda row: row.bytes_moved / rate)


if __name__ == "__main__":
    main()
