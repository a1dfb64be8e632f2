"""Multiply float32 matrices on a CPU with oneDNN or with torch's BLAS.

`cpu_tuning` measures which of both is faster for the model of a run. Without a measurement oneDNN is used
with AVX-512 on processors that are not Intel's, and torch's BLAS elsewhere.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Library = Literal["blas", "onednn"]


@dataclass(frozen=True)
class CpuProducts:
    """Name the library of the trainer's products and that of the engine's.

    `packed` is oneDNN with a copy of the weights in its own layout, packed again after each update.
    """

    trainer: Library
    engine: Literal["blas", "onednn", "packed"]


_in_use: CpuProducts | None = None


def use_products(products: CpuProducts | None) -> None:
    """Choose the libraries of this process; None returns to the choice by processor."""
    global _in_use
    _in_use = products


def products_in_use() -> CpuProducts:
    """Return the libraries of this process: those of `use_products`, else those of `default_library`."""
    if _in_use is not None:
        return _in_use
    library = default_library()
    return CpuProducts(library, library)


def default_library() -> Library:
    """Return the library by processor: oneDNN with AVX-512, but torch's BLAS on Intel's.

    On some AMD processors torch's MKL uses its AVX2 path: oneDNN ran 2.1 to 2.6 times faster there. On a Xeon
    with AVX-512 MKL trained SmolLM2-135M 1.1 to 1.2 times faster than oneDNN.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if has_avx512 and not is_intel() else "blas"


@cache
def is_intel() -> bool:
    """Return whether /proc/cpuinfo names Intel as the vendor of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            return any("GenuineIntel" in line for line in cpuinfo if line.startswith("vendor_id"))
    except OSError:
        return False


def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias on a CPU from the weight in its given layout (no packed copy).

    The library is the engine's. No autograd.
    """
    if products_in_use().engine == "blas" or x.dtype is not torch.float32 or not x.numel():
        return torch.nn.functional.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias with oneDNN; float32, not empty, no autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_or_none(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """Compute a @ b with oneDNN; return None if torch should compute it. The library is the trainer's."""
    if (
        products_in_use().trainer == "blas"
        or b.dim() != 2
        or a.dim() < 2
        or a.dtype is not torch.float32
        or b.dtype is not torch.float32
    ):
        return None
    needs_autograd = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return None if needs_autograd or not a.numel() or not b.numel() else onednn_linear(a, b.t())


MATMULS = frozenset({torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__})
