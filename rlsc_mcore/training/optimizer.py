"""Megatron-Core's data-parallel wrapper and optimizer, and the learning rate of a step."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from rlsc_mcore.config import Config, ConfigError, OptimizerConfig
from rlsc_mcore.model.architecture import DTYPES
from rlsc_mcore.model.build import Policy
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.packages import has_transformer_engine


def wrap_data_parallel(policy: Policy, config: Config, backend: Backend) -> DistributedDataParallel:
    """Wrap the policy so that gradients are summed over data-parallel ranks in fp32.

    Mutates the policy's parameters: their storage moves into one contiguous buffer (before an engine aliases them). Raises
    `ConfigError` where overlapped reduction would make a layout whose checkpoints are corrupt.
    """
    with backend.megatron():
        ddp = DistributedDataParallel(
            policy.megatron_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.optimizer.distributed,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                overlap_param_gather=config.parallel.overlap_param_gather,
                bucket_size=config.parallel.bucket_size,
                # A NaN is found in the gradient norm, where the step can still be skipped; this check would only crash.
                check_for_nan_in_grad=False,
            ),
            policy.model,
        )
    if config.optimizer.distributed:
        _refuse_padded_buckets(ddp)
    return ddp


def _refuse_padded_buckets(ddp: DistributedDataParallel) -> None:
    """Megatron-Core 0.16.1 saves several padded buckets wrongly: weights and moments come back shifted, with a log line at most."""
    for buffer in ddp.buffers:
        for number, bucket in enumerate(buffer.buckets):
            padding = bucket.grad_data.numel() - bucket.numel_unpadded
            if padding and len(buffer.buckets) > 1:
                raise ConfigError(
                    f"parallel.overlap_grad_reduce: bucket {number + 1} of {len(buffer.buckets)} would be padded by {padding} elements, "
                    "and Megatron-Core 0.16.1 corrupts the checkpoints of such a layout; turn it off or choose another parallel.bucket_size"
                )


def check_optimizer(config: Config, backend: Backend) -> None:
    """Raise `ConfigError` for optimizer options that cannot run here."""
    options = config.optimizer
    if options.cpu_offload and not backend.is_cuda:
        raise ConfigError("optimizer.cpu_offload: there is no GPU whose memory it would spare; set it to 0")
    if options.offload_during_rollout and not backend.is_cuda:
        raise ConfigError("optimizer.offload_during_rollout: there is no GPU whose memory it would spare; turn it off")
    if options.offload_during_rollout and options.cpu_offload:
        raise ConfigError("optimizer.offload_during_rollout, optimizer.cpu_offload: choose one of the two")
    if options.precision_aware and not (backend.is_cuda and has_transformer_engine()):
        reason = "TransformerEngine does not import" if backend.is_cuda else "there is no GPU"
        raise ConfigError(f"optimizer.precision_aware: it needs TransformerEngine's FusedAdam, and {reason}; turn it off")
    if options.precision_aware and options.cpu_offload:
        raise ConfigError("optimizer.precision_aware, optimizer.cpu_offload: choose one of the two")


def build_optimizer(config: Config, ddp: DistributedDataParallel, backend: Backend) -> Any:
    """Build AdamW on Megatron's mixed-precision, optionally distributed optimizer (fp32 master weights for bfloat16).

    Its moments exist from the start, so that a run that is stopped before its first step can be saved.
    """
    options, dtype = config.optimizer, DTYPES[config.model.dtype]
    check_optimizer(config, backend)
    extra: dict[str, Any] = {}
    if options.precision_aware:
        extra.update(use_precision_aware_optimizer=True, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)
    if options.cpu_offload:
        extra.update(optimizer_cpu_offload=True, optimizer_offload_fraction=options.cpu_offload, overlap_cpu_optimizer_d2h_h2d=True)
    with backend.megatron():
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
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
            ),
            [ddp],
        )
        for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
            chained.init_state_fn(chained.optimizer, chained.config)
            for group in chained.optimizer.param_groups:
                group.setdefault("step", 0)
    return optimizer


def learning_rate(options: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up, then constant or decayed to `min_lr` at `num_steps`."""
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
