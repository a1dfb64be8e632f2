"""A stand-in for TransformerEngine's FusedAdam without a GPU: its signatures and state, with torch's
arithmetic.

TransformerEngine's kernels reject fake tensors. tests/unit/test_te_signatures.py compares this class with
the signatures of TransformerEngine's published sources.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW with moments and master weights in data types of their own, as in TransformerEngine 2.11."""

    largest_part = 0  # most elements that one kernel call of this process updated

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay
        )
        super().__init__(params, defaults)
        self.adam_w_mode, self.master_weights = adam_w_mode, master_weights
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """Return a state as float32; remainders of master weights stay int16."""
        state: torch.Tensor = self.state[param][state_name]
        if state_name == "master_param" and self.store_param_remainders and param.dtype == torch.bfloat16:
            assert state.dtype == torch.int16
            return state
        assert state.dtype == self.name_to_dtype_map[state_name]
        return state.float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Copy `unscaled_state` to a state of `param`; allocate the state if there is none."""
        remainders = (
            self.store_param_remainders and state_name == "master_param" and param.dtype == torch.bfloat16
        )
        assert unscaled_state.dtype == (torch.int16 if remainders else torch.float32)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name, False, remainders)
        self.state[param][state_name].copy_(unscaled_state)

    def _initialize_state(
        self, param: torch.Tensor, state_name: str, zero_buffer: bool, store_param_remainders: bool = False
    ) -> None:
        dtype = torch.int16 if store_param_remainders else self.name_to_dtype_map[state_name]
        make = torch.zeros if zero_buffer or store_param_remainders else torch.empty
        self.state[param][state_name] = make(param.shape, dtype=dtype, device=param.device)

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        """Allocate the moments of `param` and, if configured, its master weights."""
        self._initialize_state(param, "exp_avg", zero_buffer=True)
        self._initialize_state(param, "exp_avg_sq", zero_buffer=True)
        if self.master_weights:
            self._initialize_state(
                param, "master_param", zero_buffer=False, store_param_remainders=store_param_remainders
            )
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.clone().detach().float())

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups; the state must be empty."""
        assert not self.state, "TransformerEngine's state_dict() copies all moments to float32 at once"
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load parameter groups; the state must be empty."""
        assert not self.state, "TransformerEngine's load_state_dict() allocates the state a second time"
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Update all parameters in place; the arguments are ignored."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            numel = sum(param.numel() for param in group["params"])
            type(self).largest_part = max(type(self).largest_part, numel)
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(
                        param, self.store_param_remainders and param.dtype == torch.bfloat16
                    )
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(group, param, grad.float())

    def _update(self, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor) -> None:
        (beta1, beta2), step, state = group["betas"], group["step"], self.state[param]
        average, square = (
            self.get_unscaled_state(param, "exp_avg"),
            self.get_unscaled_state(param, "exp_avg_sq"),
        )
        average = beta1 * average + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad * grad
        corrected = (average / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        master = state["master_param"] if self.master_weights else param
        master.sub_(group["lr"] * (corrected + group["weight_decay"] * master))
        param.copy_(master)
        self.set_scaled_state(param, "exp_avg", average)
        self.set_scaled_state(param, "exp_avg_sq", square)


def install() -> None:
    """Make Megatron-Core in this process use the stand-in, as if TransformerEngine 2.11 were installed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer_config as optimizer_config

    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    optimizer.Adam = distributed.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True
    for module in (optimizer, optimizer_config):
        module.is_te_min_version = lambda version, check_equality=True: True
