"""Run a step's micro-batches in Megatron's schedule: 1F1B over pipeline stages, one after another without a
pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config


def run_schedule(
    ddp: DistributedDataParallel,
    forward: Callable[[int], Any],
    num_micro_batches: int,
    *,
    forward_only: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Run forward and (unless `forward_only`) backward over the micro-batches; collective over the pipeline
    group.

    `forward(i)` runs the model on micro-batch i. On the last stage it returns (a tensor, what to keep): the
    tensor is the loss, whose gradient begins as 1. On other stages it returns the hidden states that travel
    on. Returns what the last stage kept, in order, and nothing on other stages. All stages must pass the same
    number of micro-batches of the same lengths. Gradients are summed over micro-batches into the buffers of
    `ddp`; where reduction is overlapped, it begins in the last backward pass.
    """
    if num_micro_batches == 0:
        return []
    kept: list[Any] = []

    def keep(output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        kept.append(output[1])
        # Of a triple, under `calculate_per_token_loss`, Megatron divides the loss neither by tokens nor by
        # micro-batches.
        return output[0], torch.ones((), dtype=torch.int), {}

    def forward_step(micro_batches: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        output = forward(next(micro_batches))
        on_batch()
        return output, keep

    config = get_model_config(ddp)
    config.no_sync_func = ddp.no_sync
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(num_micro_batches)),
        model=[ddp],
        num_microbatches=num_micro_batches,
        seq_length=1,  # lengths vary: shapes travel before tensors
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return kept
