"""Build Megatron-Core's data-parallel wrapper and optimizer, and compute the learning rate of a step."""

import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from rlsc_mcore.config import Config, ConfigError, OptimizerConfig
from rlsc_mcore.model.architecture import DTYPES
from rlsc_mcore.model.build import Policy
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.packages import has_transformer_engine
from rlsc_mcore.planning.memory import UPDATE_PART_ELEMENTS


def wrap_data_parallel(policy: Policy, config: Config, backend: Backend) -> DistributedDataParallel:
    """Wrap the policy in Megatron's DDP; gradients are accumulated and reduced in `optimizer.grad_dtype`.

    Mutates the policy's parameters: their storage moves into one contiguous buffer. This must happen before
    an engine aliases them.
    """
    with backend.megatron():
        return DistributedDataParallel(
            policy.megatron_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.optimizer.grad_dtype == "float32",
                use_distributed_optimizer=config.optimizer.distributed,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                overlap_param_gather=config.parallel.overlap_param_gather,
                bucket_size=config.parallel.bucket_size,
                # This check would end the run. The gradient norm also detects a NaN, and then the step is
                # skipped.
                check_for_nan_in_grad=False,
            ),
            policy.model,
        )


def check_optimizer(config: Config, backend: Backend) -> None:
    """Raise `ConfigError` for optimizer options that this machine or their combination does not allow."""
    options = config.optimizer
    if options.cpu_offload and not backend.is_cuda:
        raise ConfigError("optimizer.cpu_offload: there is no GPU whose memory it would spare; set it to 0")
    if options.offload_during_rollout and not backend.is_cuda:
        raise ConfigError(
            "optimizer.offload_during_rollout: there is no GPU whose memory it would spare; turn it off"
        )
    if options.offload_during_rollout and options.cpu_offload:
        raise ConfigError("optimizer.offload_during_rollout, optimizer.cpu_offload: choose one of the two")
    if options.cpu_offload and not has_transformer_engine():
        raise ConfigError(
            "optimizer.cpu_offload: Megatron-Core's optimizer on the host needs TransformerEngine, which "
            "does not import"
        )
    if options.precision_aware and not (backend.is_cuda and has_transformer_engine()):
        reason = "TransformerEngine does not import" if backend.is_cuda else "there is no GPU"
        raise ConfigError(
            f"optimizer.precision_aware: it needs TransformerEngine's FusedAdam, and {reason}; turn it off"
        )
    if options.precision_aware and options.cpu_offload:
        raise ConfigError("optimizer.precision_aware, optimizer.cpu_offload: choose one of the two")


def build_optimizer(config: Config, ddp: DistributedDataParallel, backend: Backend) -> Any:
    """Build AdamW in Megatron's mixed-precision optimizer, which may be distributed.

    bfloat16 parameters get fp32 master weights. The moments are allocated here, so that a run that is stopped
    before its first step can be saved.
    """
    check_optimizer(config, backend)
    with backend.megatron():
        optimizer = get_megatron_optimizer(
            megatron_optimizer_config(config), [ddp], use_gloo_process_groups=False
        )
        if config.optimizer.cpu_offload:
            # Megatron builds it twice. The first one holds fp32 copies of whole parameters until its reference
            # cycles are collected.
            gc.collect()
        for member in members(optimizer):
            initialize_state(member)
    return optimizer


def megatron_optimizer_config(config: Config) -> MegatronOptimizerConfig:
    """Translate `config` to Megatron's optimizer configuration."""
    options, dtype = config.optimizer, DTYPES[config.model.dtype]
    extra: dict[str, Any] = {}
    if options.precision_aware:
        extra.update(
            use_precision_aware_optimizer=True,
            exp_avg_dtype=torch.bfloat16,
            exp_avg_sq_dtype=torch.bfloat16,
            main_grads_dtype=DTYPES[options.grad_dtype],
            # Megatron-Core 0.16.1 saves the 16-bit remainders like weights and cannot load them.
            store_param_remainders=False,
        )
    if options.cpu_offload:
        # Without the precision-aware layout the fp32 master weights stay on the GPU in addition to their
        # copies on the host.
        extra.update(
            use_precision_aware_optimizer=True,
            main_grads_dtype=DTYPES[options.grad_dtype],
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=options.cpu_offload,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        weight_decay=options.weight_decay,
        decoupled_weight_decay=True,
        clip_grad=options.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=options.distributed,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **extra,
    )


def members(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron chained, or the single one that it built."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def initialize_state(member: Any) -> None:
    """Allocate the moments (zero) of a Megatron optimizer and the master weights that its Adam keeps.

    Mutates its state. Megatron's own `init_state_fn` is None for an optimizer on the host, and it omits an
    argument of TransformerEngine's `FusedAdam.initialize_state`.
    """
    inner = member.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        for sub_optimizer in inner.sub_optimizers:
            is_on_host = sub_optimizer is not inner.gpu_optimizer
            for parameter in parameters_of(sub_optimizer):
                state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                if is_on_host:  # torch's AdamW counts steps per parameter, FusedAdam per group
                    state["step"] = torch.zeros((), dtype=torch.float32)
                sub_optimizer.state[parameter] = state
        inner._sync_sub_optimizers_state_to_hdo()
        return
    if member.config.use_precision_aware_optimizer:
        for parameter in parameters_of(inner):
            inner.initialize_state(parameter, store_param_remainders=False)
        if not hasattr(
            inner, "fuse_unscale"
        ):  # TransformerEngine 2.13 reads bfloat16 moments without float32 copies
            inner.step = functools.partial(step_in_parts, inner, inner.step)
    else:
        member.init_state_fn(inner, member.config)
    for group in inner.param_groups:
        group.setdefault("step", 0)


def parameters_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters of a torch optimizer, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def step_in_parts(optimizer: Any, step: Callable[[], Any], largest: int = UPDATE_PART_ELEMENTS) -> None:
    """Call `step` once per part of at most `largest` elements, or of one parameter.

    TransformerEngine's FusedAdam (2.12 and earlier) copies both bfloat16 moments of a whole parameter group
    to float32, 8 bytes per element, before it updates the group. Mutates parameters, state and the groups'
    step counts in the same way as one call of `step`.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            count = group["step"]
            for part in _parts(group["params"], largest):
                optimizer.param_groups = [{**group, "params": part}]
                step()
            group["step"] = count + 1
    finally:
        optimizer.param_groups = groups


def _parts(parameters: Sequence[torch.Tensor], largest: int) -> Iterator[list[torch.Tensor]]:
    part: list[torch.Tensor] = []
    numel = 0
    for parameter in parameters:
        if part and numel + parameter.numel() > largest:
            yield part
            part, numel = [], 0
        part.append(parameter)
        numel += parameter.numel()
    if part:
        yield part


def clip_gradients(optimizer: Any, largest_norm: float, norm: float) -> None:
    """Scale the gradients in place so that their global norm is at most `largest_norm`; no collective.

    `norm` is the global norm before.
    """
    for member in members(optimizer):
        parameters = member.get_parameters()
        decoupled = bool(member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
        attribute = "decoupled_grad" if decoupled else "grad"
        has_gradients = any(getattr(parameter, attribute, None) is not None for parameter in parameters)
        assert has_gradients or not parameters, (
            f"no parameter has a gradient in its {attribute}: nothing would be clipped"
        )
        clip_grad_by_total_norm_fp32(parameters, largest_norm, norm, use_decoupled_grad=decoupled)


def learning_rate(options: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (from 0).

    Linear warm-up, then constant or decayed to `min_lr` at `num_steps`.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(1, num_steps - options.warmup_steps)
    remaining = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr + (options.lr - options.min_lr) * remaining


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
