# ruff: noqa: E402, F401
"""What the parent of all test ranks imports once, so that a rank starts in tenths of a second."""

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch

torch.set_num_threads(1)

import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer

from rlsc_mcore.parallel.packages import hide_broken_torchvision

hide_broken_torchvision()

import transformers
import vllm

import rlsc_mcore.training.session
