"""Implement AdamW with the state layout of TransformerEngine's FusedAdam, in plain torch."""

from typing import Any

import torch
from torch.optim.adam import adam


class TorchFusedAdam(torch.optim.Optimizer):
    """AdamW with TransformerEngine's state layout: ``step`` is an int in the parameter group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for param in params:
                if not self.state[param]:
                    self.state[param].update(
                        exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                    )
            if not params:
                continue
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(group["step"] - 1.0, device=p.device) for p in params],
                decoupled_weight_decay=self.adam_w_mode,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
