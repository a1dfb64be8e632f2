"""Float32 products on a CPU: oneDNN where there is AVX-512, torch's BLAS elsewhere; the same numbers, and the
path that is meant."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsc_mcore.parallel import backend, cpu_products

ONEDNN = "mkldnn::_linear_pointwise"


class Recorded(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["AVX512", "AVX2", "DEFAULT"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    cpu_products.multiplies_with_onednn.cache_clear()
    yield request.param
    cpu_products.multiplies_with_onednn.cache_clear()


def test_the_engines_product(capability: str) -> None:
    x, weight, bias = torch.randn(3, 7, 48), torch.randn(40, 48), torch.randn(40)
    with torch.no_grad(), Recorded() as recorded:
        plain, biased, empty = (
            cpu_products.cpu_linear(x, weight),
            cpu_products.cpu_linear(x, weight, bias),
            cpu_products.cpu_linear(x[:0], weight),
        )
        half = cpu_products.cpu_linear(x.bfloat16(), weight.bfloat16())
    assert recorded.names.count(ONEDNN) == (2 if capability == "AVX512" else 0)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(biased.double(), expected + bias.double(), rtol=1e-5, atol=1e-5)
    assert empty.shape == (0, 7, 40) and half.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "multiply",
    [
        torch.matmul,
        torch.mm,
        lambda a, b: a @ b,
        lambda a, b: torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1])),
        lambda a, b: torch.zeros(a.shape[0], b.shape[1]).addmm_(a, b),
    ],
    ids=["matmul", "mm", "operator", "out", "addmm_"],
)
def test_megatrons_products(
    capability: str, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    a, b = torch.randn(9, 32), torch.randn(24, 32).T
    with torch.no_grad(), Recorded() as recorded, backend._MegatronOnCpu():
        product = multiply(a, b)
    assert (ONEDNN in recorded.names) == (capability == "AVX512")
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_what_autograd_needs_stays_torchs(capability: str) -> None:
    a, b = torch.randn(9, 32, requires_grad=True), torch.randn(32, 24)
    with Recorded() as recorded, backend._MegatronOnCpu():
        (a @ b).sum().backward()
    assert ONEDNN not in recorded.names and a.grad is not None
