"""What the layers are told on a GPU, and their parts that can be computed on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsc_mcore.config import ModelConfig
from rlsc_mcore.model import architecture, torch_layers
from rlsc_mcore.model.shape import read_architecture
from tests.unit.test_architecture import _Cpu, _Cuda, write


def megatron_config(folder: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(architecture, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(
        rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *arguments: None
    )  # Megatron asks whether it is there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    fp8, recompute = options.get("fp8", "none"), options.get("recompute", "none")
    model = ModelConfig(path="m", dtype="bfloat16", fp8=fp8)
    return architecture.transformer_config(
        read_architecture(write(folder)), model, backend, tp=1, recompute=recompute
    )


def test_swiglu_is_megatrons_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = megatron_config(tmp_path, _Cuda(), monkeypatch)
    assert gpu.bias_activation_fusion and not gpu.use_te_activation_func
    cpu = megatron_config(tmp_path, _Cpu(), monkeypatch)
    assert cpu.use_te_activation_func and not cpu.bias_activation_fusion


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_fp8_scales_by_the_current_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp8: str) -> None:
    """Delayed scaling all-reduces over data-parallel ranks once per pass, and ranks have unequal numbers of
    passes."""
    config = megatron_config(tmp_path, _Cuda(), monkeypatch, fp8=fp8)
    assert config.fp8 == fp8 and config.fp8_recipe == "tensorwise" and not config.fp8_param


def test_selective_recomputation_is_of_the_mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = megatron_config(tmp_path, _Cuda(), monkeypatch, recompute="selective")
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["mlp"])


def test_fused_swiglu_is_the_same_function_and_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's fused function, run without its compiler, against the plain formula in float64."""
    from megatron.core.fusions import fused_bias_swiglu

    gate_up = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 7, dtype=torch.float64)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with (
        torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        fused = fused_bias_swiglu.bias_swiglu_impl(gate_up, None)
        (grad,) = torch.autograd.grad(fused, gate_up, upstream)
    gate, up = gate_up.chunk(2, dim=-1)
    plain = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, gate_up, upstream)[0])
    assert sum(kept) == gate_up.numel()  # the product is kept by the next layer: 3 widths in all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rotation_is_each_sequences_own(dtype: torch.dtype) -> None:
    """Against the rotation of complex numbers, sequence by sequence."""
    lengths, heads, dim = (5, 1, 9, 3), 2, 8
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(16).float(), frequencies)
    table = torch.cat((angles, angles), dim=-1)[:, None, None]
    queries = torch.randn(sum(lengths), heads, dim, dtype=dtype)
    rotated = torch_layers.RotaryFactors.of(table, lengths, dtype).rotate(queries)
    assert rotated.dtype == dtype
    for sequence, result in zip(queries.split(lengths), rotated.split(lengths), strict=True):
        first, second = sequence.double().chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[
            : len(sequence), None
        ].to(torch.complex128)
        expected = torch.cat((turned.real, turned.imag), dim=-1)
        torch.testing.assert_close(
            result.double(), expected, rtol=0, atol=1e-6 if dtype is torch.float32 else 0.05
        )


def test_packed_rotation_reads_nothing_back() -> None:
    """On meta tensors any read of a value raises."""
    factors = torch_layers.RotaryFactors.of(torch.empty(16, 1, 1, 8, device="meta"), (5, 9), torch.bfloat16)
    assert factors.rotate(torch.empty(14, 2, 8, device="meta", dtype=torch.bfloat16)).shape == (14, 2, 8)


def test_weight_gradients_are_accumulated_by_the_layers_that_can() -> None:
    from rlsc_mcore.model.build import fuse_gradient_accumulation

    class Linear(torch.nn.Linear):
        fuse_wgrad_accumulation = False  # TransformerEngine's attribute

    model = torch.nn.Module()
    model.decoder, model.output_layer = torch.nn.Sequential(Linear(2, 2), torch.nn.Linear(2, 2)), Linear(2, 2)
    fuse_gradient_accumulation(model)  # type: ignore[arg-type]
    assert model.decoder[0].fuse_wgrad_accumulation and not hasattr(
        model.decoder[1], "fuse_wgrad_accumulation"
    )
    assert not model.output_layer.fuse_wgrad_accumulation
