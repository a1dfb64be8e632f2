"""Score with the weights that training started with: the reference of a KL penalty and of `nsd`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlsc_mcore.model.build import Policy


class StartingWeights:
    """Keep a policy's starting weights: W0 of its adapters, or a copy of all parameters on their device."""

    def __init__(self, policy: Policy) -> None:
        """Copy the parameters, unless the policy has adapters; call it before a checkpoint is loaded."""
        self._policy = policy
        self._copies: dict[str, torch.Tensor] = {}
        if policy.adapters is None:
            parameters = policy.model.named_parameters()
            self._copies = {name: parameter.detach().clone() for name, parameter in parameters}

    def tensors(self) -> list[torch.Tensor]:
        """Return the copies, which occupy memory of their own."""
        return list(self._copies.values())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model's parameters be the starting weights inside the block, for passes without
        gradients."""
        model, adapters = self._policy.model, self._policy.adapters
        if adapters is not None:
            with adapters.starting_weights():
                yield
            return
        model.free_quantized_weights()
        kept = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            for name, parameter in model.named_parameters():
                parameter.data = self._copies[name]
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = kept[name]
            model.free_quantized_weights()
