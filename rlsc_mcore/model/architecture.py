"""Build a Megatron-Core `TransformerConfig` and layer spec from the architecture of a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from rlsc_mcore.config import ConfigError, ModelConfig
from rlsc_mcore.model.families import FAMILIES
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.model.torch_layers import RMSNorm, SDPACoreAttention, SwiGLU
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.packages import has_transformer_engine

# Head sizes that vLLM's CPU attention supports. Another size passes start-up and fails at the first generate.
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_head_dim(architecture: Architecture, backend: Backend, source: Path) -> None:
    """Raise `ConfigError` for a head size that vLLM's CPU attention cannot run."""
    derived = architecture.hidden_size // architecture.num_heads
    if FAMILIES[architecture.name].head_dim_is_derived and architecture.head_dim != derived:
        raise ConfigError(
            f"{source}/config.json: head_dim: vLLM's {architecture.name} takes hidden_size / heads = "
            f"{derived}, not {architecture.head_dim}"
        )
    if not backend.is_cuda and architecture.head_dim not in CPU_HEAD_DIMS:
        sizes = ", ".join(map(str, CPU_HEAD_DIMS))
        raise ConfigError(
            f"{source}/config.json: head_dim: vLLM on a CPU runs {sizes}, not {architecture.head_dim}"
        )


def transformer_config(
    architecture: Architecture,
    model: ModelConfig,
    backend: Backend,
    *,
    tp: int,
    recompute: str = "none",
    stage_layers: Sequence[int] = (),
) -> TransformerConfig:
    """Build Megatron's configuration of the model for `tp` tensor-parallel ranks (sequence parallel for tp >
    1).

    `stage_layers`: layers of each pipeline stage; without it, or with one stage, there is no pipeline.
    """
    dtype = DTYPES[model.dtype]
    options: dict[str, Any] = {}
    if len(stage_layers) > 1:
        options.update(
            pipeline_model_parallel_size=len(stage_layers),
            pipeline_model_parallel_layout=_pipeline_layout(stage_layers),
            variable_seq_lengths=True,  # micro-batches differ in length, so shapes are sent before tensors
            # unused, but Megatron rejects varying lengths with the default, even without experts
            moe_token_dispatcher_type="alltoall",
            batch_p2p_comm=True,
            deallocate_pipeline_outputs=True,
        )
    if recompute == "selective":
        # Megatron's default module is the core of attention. A fused kernel stores almost nothing there, so
        # recomputing it saves little.
        options.update(recompute_granularity="selective", recompute_modules=["mlp"])
    elif recompute == "full":
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if not backend.is_cuda:
        options.update(use_cpu_initialization=True)
    check_fp8(model, backend)
    if model.fp8 != "none":
        # Scale with the current tensor. Delayed scaling, Megatron's default, all-reduces its statistics over
        # the data-parallel ranks after every pass. It would deadlock on ranks with unequal numbers of
        # micro-batches.
        options.update(fp8=model.fp8, fp8_recipe="tensorwise")
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The loss is divided by the global number of samples before backward, so gradients are summed over
        # ranks instead of averaged.
        calculate_per_token_loss=True,
        # perform_initialization stays on, because it also marks the parameters as tensor-parallel. Without
        # the marks the gradient norm omits the shards of ranks > 0.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Without a fusion autograd keeps 5 instead of 3 MLP widths per token. Megatron's uses torch.compile,
        # which needs a C++ compiler on a CPU: there `layer_spec` names a function of this package.
        bias_activation_fusion=backend.is_cuda,
        use_te_activation_func=not backend.is_cuda,
        bias_dropout_fusion=False,
        apply_rope_fusion=backend.is_cuda and uses_transformer_engine(model, backend),
        **options,
    )


def _pipeline_layout(stage_layers: Sequence[int]) -> list[list[str]]:
    """Name the parts of each stage for Megatron's pipeline layout: embedding first, loss last."""
    layout = [["decoder"] * layers for layers in stage_layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def uses_transformer_engine(model: ModelConfig, backend: Backend) -> bool:
    """Return whether the layers use TransformerEngine; raises `ConfigError` if it is required but not
    available."""
    if model.layers == "torch" or (
        model.layers == "auto" and (not backend.is_cuda or model.dtype == "float32")
    ):
        return False  # TransformerEngine's packed attention needs 16-bit types
    if has_transformer_engine() and backend.is_cuda:
        return True
    if model.layers == "transformer_engine":
        reason = "it does not import" if backend.is_cuda else "it needs a GPU"
        raise ConfigError(f"model.layers: transformer_engine was asked for, but {reason}; use auto or torch")
    return False


def layers_reason(model: ModelConfig, backend: Backend) -> str:
    """Return the reason for the choice of layers, in a few words."""
    if model.layers != "auto":
        return f"model.layers is {model.layers}"
    if not backend.is_cuda:
        return "TransformerEngine needs a GPU"
    if model.dtype == "float32":
        return "TransformerEngine's packed attention wants 16-bit types"
    return "TransformerEngine imports" if has_transformer_engine() else "TransformerEngine does not import"


def check_fp8(model: ModelConfig, backend: Backend) -> None:
    """Raise `ConfigError` if fp8 is requested but not available."""
    if model.fp8 == "none":
        return
    if not backend.is_cuda:
        raise ConfigError(
            f"model.fp8: {model.fp8} needs an NVIDIA GPU of compute capability 8.9 or more; use none"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise ConfigError(
            f"model.fp8: {model.fp8} needs compute capability 8.9 or more, this GPU has "
            f"{capability[0]}.{capability[1]}; use none"
        )
    if not uses_transformer_engine(model, backend):
        raise ConfigError(
            f"model.fp8: {model.fp8} needs TransformerEngine layers, and torch SDPA layers are in use; see "
            "rlsc doctor"
        )


def layer_spec(
    config: TransformerConfig, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return TransformerEngine's layer spec, or this package's spec with torch SDPA and RMSNorm."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    layer.mlp.submodules.activation_func = SwiGLU
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A block spec is needed because the final norm of Megatron's default block does not support sequence
    # parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
