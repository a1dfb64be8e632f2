"""Call the compiled row ops of csrc/ on CPU and CUDA: load the extension, allocate outputs, report why it
cannot run.

Shape suffixes: T tokens (rows of logits), Vp vocabulary columns of this rank with padding, k statistics.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from rlsc_mcore.ops.reference import num_stats

VERSION = 5  # must equal kVersion of csrc/bindings.cpp
CLUSTER_OPS = ("rest_softmax_", "rest_softmax_into", "log_prob_dlogits_")
ALIGNMENT_BYTES = 16  # required of row addresses and row strides by a bulk copy
LARGEST_ROW_BYTES = 8 * 225 * 1024  # 8 blocks per cluster, each with the shared memory of a multiprocessor


@functools.cache
def load() -> str | None:
    """Load rlsc_mcore._C once; return None, or the reason why it is not available. It registers ops and has
    no Python module."""
    spec = importlib.util.find_spec("rlsc_mcore._C")
    if spec is None or spec.origin is None:
        return "rlsc_mcore._C is not built (pip install --no-build-isolation with a C++ compiler)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"rlsc_mcore._C does not load with torch {torch.__version__}: {str(error).splitlines()[0]}; rebuild it"
    built = torch.ops.rlsc_native.version() if hasattr(torch.ops.rlsc_native, "version") else 0
    if built != VERSION:
        return f"rlsc_mcore._C is version {built}, this code needs {VERSION}: rebuild it (python setup.py build_ext --inplace)"
    return None


def why_not(op: str, device_type: str) -> str | None:
    """Return why the compiled `op` cannot run on a device type; None if it can."""
    reason = load()
    if reason is not None:
        return reason
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    native_op = {"scored_stats": "log_prob_stats"}.get(op, op)
    if op == "rest_softmax_into" and device_type == "cpu":
        native_op = "rest_softmax_"  # followed by a copy
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"rlsc_native::{native_op}", key):
        return f"rlsc_mcore._C was built without {op} for {device_type}"
    if device_type == "cuda" and op in CLUSTER_OPS and torch.cuda.get_device_capability()[0] < 9:
        return "thread-block clusters need sm_90"
    if (
        device_type == "cuda"
        and op in CLUSTER_OPS
        and (error := torch.ops.rlsc_native.cuda_error(torch.cuda.current_device()))
    ):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return (
            f"rlsc_mcore._C has no code for compute capability {capability} (CUDA error {error}); "
            f"rebuild it with TORCH_CUDA_ARCH_LIST={capability}"
        )
    return None


def _stats_like(logits_TVp: Tensor, with_entropy: bool) -> Tensor:
    return torch.empty(
        logits_TVp.shape[0], num_stats(with_entropy), dtype=torch.float32, device=logits_TVp.device
    )


def log_prob_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> Tensor:
    """Compiled `reference.log_prob_stats`."""
    stats = _stats_like(logits_TVp, with_entropy)
    no_log_probs = stats.new_empty(0)
    torch.ops.rlsc_native.log_prob_stats(
        logits_TVp, targets_T.contiguous(), stats, no_log_probs, inv_temperature, vocab_start, num_columns
    )
    return stats


def scored_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Compiled `reference.scored_stats`."""
    stats = _stats_like(logits_TVp, with_entropy)
    log_probs_T = stats.new_empty(stats.shape[0])
    torch.ops.rlsc_native.log_prob_stats(
        logits_TVp, targets_T.contiguous(), stats, log_probs_T, inv_temperature, vocab_start, num_columns
    )
    return stats, log_probs_T


def dlogits(
    grad_stats_Tk: Tensor,
    stats_Tk: Tensor,
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    out: Tensor | None = None,
) -> Tensor:
    """Compiled `reference.dlogits`; `out` may be the logits."""
    out = torch.empty_like(logits_TVp) if out is None else out
    torch.ops.rlsc_native.dlogits(
        grad_stats_Tk.contiguous(),
        stats_Tk.contiguous(),
        logits_TVp,
        targets_T.contiguous(),
        out,
        inv_temperature,
        vocab_start,
        num_columns,
    )
    return out


def _other_implementation(op: str, logits_TVp: Tensor, num_columns: int) -> Callable[..., Tensor] | None:
    """Return the op for rows that the cluster kernel cannot take (not aligned for bulk copies, or larger than
    shared memory); None if it can."""
    if not logits_TVp.is_cuda:
        return None
    size, stride = logits_TVp.element_size(), logits_TVp.stride(0) if logits_TVp.shape[0] > 1 else 0
    is_aligned = logits_TVp.data_ptr() % ALIGNMENT_BYTES == 0 and stride * size % ALIGNMENT_BYTES == 0
    if is_aligned and num_columns * size <= LARGEST_ROW_BYTES:
        return None
    from rlsc_mcore.ops import dispatch

    backend = "triton" if dispatch.why_not("triton", op, "cuda") is None else "reference"
    return dispatch.select(op, logits_TVp.device, logits_TVp.dtype, backend)


def rest_softmax_(
    logits_TVp: Tensor, targets_T: Tensor, inv_temperature: float, vocab_start: int, num_columns: int
) -> Tensor:
    """Compiled `reference.rest_softmax_`."""
    if (other := _other_implementation("rest_softmax_", logits_TVp, num_columns)) is not None:
        return other(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns)
    stats = _stats_like(logits_TVp, False)
    torch.ops.rlsc_native.rest_softmax_(
        logits_TVp, targets_T.contiguous(), stats, inv_temperature, vocab_start, num_columns
    )
    return stats


def rest_softmax_into(
    logits_TVp: Tensor,
    out_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Compiled `reference.rest_softmax_into`. GPU: one read of the logits and one write of `out_TVp`. CPU: an
    additional copy."""
    aligned_out = (
        out_TVp.data_ptr() % ALIGNMENT_BYTES == 0
        and out_TVp.stride(0) * out_TVp.element_size() % ALIGNMENT_BYTES == 0
    )
    if (
        logits_TVp.is_cuda
        and aligned_out
        and _other_implementation("rest_softmax_", logits_TVp, num_columns) is None
    ):
        stats = _stats_like(logits_TVp, False)
        torch.ops.rlsc_native.rest_softmax_into(
            logits_TVp, out_TVp, targets_T.contiguous(), stats, inv_temperature, vocab_start, num_columns
        )
        return stats
    stats = rest_softmax_(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns)
    out_TVp.copy_(logits_TVp)
    return stats


def log_prob_dlogits_(
    logits_TVp: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Compiled `reference.log_prob_dlogits_`."""
    if (other := _other_implementation("log_prob_dlogits_", logits_TVp, num_columns)) is not None:
        return other(logits_TVp, targets_T, weights_T, inv_temperature, vocab_start, num_columns)
    log_probs_T = torch.empty(logits_TVp.shape[0], dtype=torch.float32, device=logits_TVp.device)
    weights_T = weights_T.to(torch.float32).contiguous()
    torch.ops.rlsc_native.log_prob_dlogits_(
        logits_TVp, targets_T.contiguous(), weights_T, log_probs_T, inv_temperature, vocab_start, num_columns
    )
    return log_probs_T


def sequence_sums(values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compiled `reference.sequence_sums`."""
    sums = torch.empty(cu_seqlens.shape[0] - 1, dtype=torch.float64, device=values_T.device)
    torch.ops.rlsc_native.sequence_sums(
        values_T.contiguous(), mask_T.contiguous(), cu_seqlens.contiguous(), sums
    )
    return sums
