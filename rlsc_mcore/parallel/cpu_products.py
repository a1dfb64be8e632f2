"""Multiply float32 matrices on a CPU with the faster of oneDNN and torch's BLAS."""

import functools

import torch


@functools.cache
def multiplies_with_onednn() -> bool:
    """Return whether float32 products on a CPU use oneDNN instead of torch's BLAS; True with AVX-512.

    torch's MKL uses its AVX2 path on AMD processors: with AVX-512 oneDNN ran 2.1 to 2.6 times faster there,
    and equally fast on Intel's. With AVX2 only, MKL is faster: 1.0 to 1.7 times in the products of a weight's
    gradient, twice with few rows.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias on a CPU from the weight in its given layout (no packed copy).

    No autograd.
    """
    if x.dtype is not torch.float32 or not x.numel() or not multiplies_with_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_or_none(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """Compute a @ b with oneDNN; return None if torch should compute it."""
    if (
        not multiplies_with_onednn()
        or b.dim() != 2
        or a.dim() < 2
        or a.dtype is not torch.float32
        or b.dtype is not torch.float32
    ):
        return None
    needs_autograd = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return None if needs_autograd or not a.numel() or not b.numel() else cpu_linear(a, b.t())


MATMULS = frozenset({torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__})
