"""Float32 products on a CPU: the chosen library computes them, and every library the same numbers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsc_mcore.config import RunError
from rlsc_mcore.parallel import backend, cpu_products
from rlsc_mcore.parallel.cpu_products import CpuProducts
from rlsc_mcore.rollout.packed_weights import PackedWeights

ONEDNN = "mkldnn::_linear_pointwise"
PACKED = "_C::onednn_mm"


class Recorded(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _products() -> Iterator[None]:
    cpu_products.use_products(None)
    yield
    cpu_products.use_products(None)


@pytest.mark.parametrize(
    ("capability", "vendor_is_intel", "library"),
    [
        ("AVX512", False, "onednn"),
        ("AVX512", True, "blas"),
        ("AVX2", False, "blas"),
        ("DEFAULT", True, "blas"),
    ],
)
def test_the_default_follows_the_processor(
    capability: str, vendor_is_intel: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "is_intel", lambda: vendor_is_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_products.products_in_use() == CpuProducts(library, library)  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_the_engines_product(library: str) -> None:
    cpu_products.use_products(CpuProducts("blas", library))  # type: ignore[arg-type]
    x, weight, bias = torch.randn(3, 7, 48), torch.randn(40, 48), torch.randn(40)
    with torch.no_grad(), Recorded() as recorded:
        plain, biased, empty = (
            cpu_products.cpu_linear(x, weight),
            cpu_products.cpu_linear(x, weight, bias),
            cpu_products.cpu_linear(x[:0], weight),
        )
        half = cpu_products.cpu_linear(x.bfloat16(), weight.bfloat16())
    assert recorded.names.count(ONEDNN) == (2 if library == "onednn" else 0)
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
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_megatrons_products(
    library: str, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    cpu_products.use_products(CpuProducts(library, "blas"))  # type: ignore[arg-type]
    a, b = torch.randn(9, 32), torch.randn(24, 32).T
    with torch.no_grad(), Recorded() as recorded, backend._MegatronOnCpu():
        product = multiply(a, b)
    assert (ONEDNN in recorded.names) == (library == "onednn")
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_what_autograd_needs_stays_torchs() -> None:
    cpu_products.use_products(CpuProducts("onednn", "onednn"))
    a, b = torch.randn(9, 32, requires_grad=True), torch.randn(32, 24)
    with Recorded() as recorded, backend._MegatronOnCpu():
        (a @ b).sum().backward()
    assert ONEDNN not in recorded.names and a.grad is not None


# ---------------------------------------------------------------- packed weights


def linear(rows: int = 40, columns: int = 48) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows).requires_grad_(False)


def adopted(*layers: torch.nn.Linear) -> PackedWeights:
    packed = PackedWeights()
    for layer in layers:
        packed.adopt(layer, remove_weight=True)
    return packed


def test_a_packed_product_is_that_of_the_weight() -> None:
    layer, x = linear(), torch.randn(3, 7, 48)
    packed = adopted(layer)
    expected = x.double() @ layer.weight.double().T
    for is_packed in (False, True):
        if is_packed:
            packed.pack()
        with torch.no_grad(), Recorded() as recorded:
            plain = layer.cpu_linear(x, layer.weight, None)
            biased = layer.cpu_linear(x, layer.weight, layer.bias)
            empty = layer.cpu_linear(x[:0], layer.weight, None)
        assert recorded.names.count(PACKED) == (2 if is_packed else 0)
        torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(biased.double(), expected + layer.bias.double(), rtol=1e-5, atol=1e-5)
        assert empty.shape == (0, 7, 40)
    assert layer.weight.shape == (40, 48)  # a swap still writes the parameter
    assert packed.nbytes() == layer.weight.nbytes
    packed.release()
    assert packed.nbytes() == 0


def test_the_next_copy_has_the_new_weights() -> None:
    layer, x = linear(), torch.randn(5, 48)
    packed = adopted(layer)
    packed.pack()
    packed.release()
    layer.weight.data.mul_(2)
    packed.pack()
    with torch.no_grad():
        product = layer.cpu_linear(x, layer.weight, None)
    torch.testing.assert_close(product.double(), x.double() @ layer.weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [40, 1000])
def test_a_copy_of_other_weights_is_refused(rows: int) -> None:
    first, second = linear(), linear(rows)
    packed = adopted(first, second)
    packed.pack()
    packed.pack()  # nothing changed
    source = second.weight.data  # shared storage, as the trainer's
    source += 1e-7 * source.abs().max()
    with pytest.raises(RunError, match="changed after it was packed"):
        packed.pack()


def test_other_types_are_not_packed() -> None:
    layer = linear().bfloat16()
    packed = adopted(layer)
    packed.pack()
    assert packed.nbytes() == 0
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    assert layer.cpu_linear(x, layer.weight, None).dtype is torch.bfloat16
