"""Run a step's micro-batches in Megatron's schedule: 1F1B over pipeline stages, else one after another."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from rlsc_mcore.observability.console import NO_BAR, ProgressBar


def run_schedule(
    ddp: DistributedDataParallel,
    forward: Callable[[int], Any],
    num_micro_batches: int,
    *,
    forward_only: bool = False,
    progress: ProgressBar = NO_BAR,
) -> list[Any]:
    """Run forward and (unless `forward_only`) backward over the micro-batches.

    Collective over the pipeline group. `forward(i)` runs the model on micro-batch i. On the last stage it
    returns (tensor, value to keep); the tensor is the loss, and backward starts from it with gradient 1. On
    other stages it returns the hidden states for the next stage. Returns the kept values in order on the last
    stage and an empty list on the others. All stages must pass the same number of micro-batches of the same
    lengths. Gradients are summed over micro-batches into the buffers of `ddp`. An overlapped reduction starts
    in the last backward pass. `progress` advances by one per forward pass.
    """
    if num_micro_batches == 0:
        return []
    kept: list[Any] = []

    def keep(output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        kept.append(output[1])
        # With `calculate_per_token_loss`, Megatron divides the loss of a triple neither by the number of
        # tokens nor by the number of micro-batches.
        return output[0], torch.ones((), dtype=torch.int), {}

    def forward_step(micro_batches: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        output = forward(next(micro_batches))
        progress.advance(1)
        return output, keep

    config = get_model_config(ddp)
    config.no_sync_func = ddp.no_sync
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(num_micro_batches)),
        model=[ddp],
        num_microbatches=num_micro_batches,
        seq_length=1,  # lengths vary: each stage sends the shape before the tensor
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return kept
