"""An engine's parameters take no memory until they are bound, and its choices do not depend on the
machine."""

import dataclasses

import pytest
import torch
from torch import nn

from rlsc_mcore.rollout.engine import (
    PINNED_COMPILATION,
    PINNED_ENVIRONMENT,
    allocate_storage,
    parameters_without_storage,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.empty(64, 32))
        self.shared.loader = "kept"  # type: ignore[attr-defined]  # vLLM hangs its weight loader on the parameter
        self.own = nn.Parameter(torch.ones(16))
        self.tied = self.shared
        self.absent: nn.Parameter | None
        self.register_parameter("absent", None)
        self.register_buffer("table", torch.arange(8.0))


def test_parameters_take_no_memory_until_they_are_bound() -> None:
    with parameters_without_storage():
        module = Block()
    assert [parameter.untyped_storage().nbytes() for parameter in module.parameters()] == [0, 0]
    assert module.shared.shape == (64, 32) and module.shared.loader == "kept" and module.tied is module.shared  # type: ignore[attr-defined]
    assert torch.equal(module.table, torch.arange(8.0))  # buffers are computed when they are made
    trainer = torch.randn(64, 32)
    module.shared.data = trainer
    for parameter in module.parameters():
        allocate_storage(parameter)
    assert module.shared.data_ptr() == trainer.data_ptr() and torch.equal(module.tied, trainer)
    assert module.own.untyped_storage().nbytes() == 64
    module.own.data.fill_(2.0)
    assert nn.Parameter(torch.ones(3)).untyped_storage().nbytes() == 12
    later = nn.Module()
    later.weight = nn.Parameter(torch.ones(3))
    assert later.weight.tolist() == [1.0, 1.0, 1.0]  # no module that is built afterwards is concerned


def test_what_is_pinned_is_vllms_own_vocabulary() -> None:
    import vllm.envs
    from vllm.config import CompilationConfig

    passes = CompilationConfig(**PINNED_COMPILATION).pass_config
    assert {field.name for field in dataclasses.fields(passes)} >= PINNED_COMPILATION["pass_config"].keys()
    assert passes.fuse_allreduce_rms is False
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PINNED_ENVIRONMENT.items():
            patch.setenv(name, value)
            assert name in vllm.envs.environment_variables
        assert vllm.envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"]() is False
