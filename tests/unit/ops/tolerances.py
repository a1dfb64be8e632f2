"""The one table of tolerances of the ops' tests, here and on a GPU.

Rule: |op - fp64| <= |eager PyTorch in the same dtype - fp64| + slack, element by element.
"""

import os

import torch

# Triton's interpreter cuts float32 to bfloat16 where a GPU and every other backend round to nearest.
ROUNDING = 2.0 if os.environ.get("TRITON_INTERPRET") == "1" else 1.0

# (absolute, relative to the float64 value): log-probs, entropies and sums come out in float32 whatever the
# logits' dtype.
VALUE_SLACK = (2e-6, 2e-6)

# Relative to the float64 value, one unit in the last place: a gradient is rounded once to the logits' dtype.
GRADIENT_ULP = {torch.float32: 6e-6, torch.bfloat16: 2.0**-8 * ROUNDING, torch.float16: 2.0**-10}

# Absolute, times the largest upstream weight: where a softmax value is subnormal in its dtype.
GRADIENT_FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 2.0**-24}

# Gradients through the two products of the head, relative to the largest float64 element.
HEAD_SLACK = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8 * ROUNDING}

# Sharded against unsharded, float64.
SHARDED = 1e-12

# Relative error of log p and of the target's gradient at p = 1 - 1e-7.
CONFIDENT = 0.01


def assert_close(got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor | float, what: str) -> None:
    """Fail with the worst element where |got - exact| exceeds what is allowed; equal infinities are equal."""
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    error = torch.where(got == exact, 0.0, (got - exact).abs())
    allowed = torch.as_tensor(allowed, dtype=torch.float64).cpu().expand_as(error)
    excess = torch.where(error.isnan(), float("inf"), error - allowed)
    if excess.numel() and excess.max() > 0:
        worst = torch.unravel_index(excess.argmax(), excess.shape)
        at = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}{list(at)}: got {got[at]:.9g}, fp64 {exact[at]:.9g}, off {error[at]:.3g}, allowed "
            f"{allowed[at]:.3g}"
        )


def value_allowance(eager: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """What a float32 value may be off: eager's own error plus the slack."""
    eager, exact = eager.detach().double().cpu(), exact.detach().double().cpu()
    absolute, relative = VALUE_SLACK
    error = torch.where(eager == exact, 0.0, (eager - exact).abs()).nan_to_num(0.0, 0.0, 0.0)
    return error + absolute + relative * exact.abs().nan_to_num(0.0, 0.0, 0.0)


def gradient_allowance(exact: torch.Tensor, dtype: torch.dtype, largest_weight: float) -> torch.Tensor:
    """What a gradient in `dtype` may be off: one unit in the last place."""
    return exact.detach().double().cpu().abs() * GRADIENT_ULP[dtype] + GRADIENT_FLOOR[dtype] * largest_weight
