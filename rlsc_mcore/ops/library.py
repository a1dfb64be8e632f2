"""Register the row ops as `torch.ops.rlsc.*`: one operator for all backends, with fakes for torch.compile and
memory models.

reference.py defines what they compute; the last argument names the backend (dispatch.py). They have no
derivative: the differentiable functions are token_log_probs, the fused heads and sequence_sums. They are
registered with torch.library.Library because the Python wrappers of custom_op cost several times the call
itself.

Shape suffixes: T tokens (rows of logits), Vp vocabulary columns of this rank with padding, k statistics, R
tensor-parallel ranks, S sequences.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlsc_mcore.ops.dispatch import select
from rlsc_mcore.ops.reference import num_stats, working_dtype

_library = torch.library.Library("rlsc", "DEF")
SHARD = "float inv_temperature, SymInt vocab_start, SymInt num_columns"


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"rlsc::{name}", fake, lib=_library)


def _overwrite(logits_TVp: Tensor) -> None:
    """Mark logits as overwritten for autograd; RuntimeError if autograd tracks them, ValueError if their rows
    share memory."""
    if logits_TVp.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "logits_TVp requires grad: expected logits that autograd does not track, because this op "
            "overwrites them; "
            "call it under torch.no_grad() or on logits.detach()"
        )
    if logits_TVp.shape[0] > 1 and logits_TVp.stride(0) < logits_TVp.shape[1]:
        raise ValueError(
            f"logits_TVp: expected rows of {logits_TVp.shape[1]} columns that share no memory, because this "
            "op overwrites them, "
            f"got row stride {logits_TVp.stride(0)}; call .contiguous()"
        )
    if not logits_TVp.is_inference():
        torch.autograd.graph.increment_version(logits_TVp)


def _log_prob_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
    backend: str,
) -> Tensor:
    run = select("log_prob_stats", logits_TVp.device, logits_TVp.dtype, backend)
    return run(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, with_entropy)


def _fake_log_prob_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
    backend: str,
) -> Tensor:
    return logits_TVp.new_empty(
        logits_TVp.shape[0], num_stats(with_entropy), dtype=working_dtype(logits_TVp.dtype)
    )


def _scored_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = select("scored_stats", logits_TVp.device, logits_TVp.dtype, backend)
    return run(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, with_entropy)


def _fake_scored_stats(logits_TVp: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    stats = _fake_log_prob_stats(logits_TVp, *arguments)
    return stats, stats.new_empty(stats.shape[0])


def _dlogits(
    logits_TVp: Tensor, grad_stats_Tk: Tensor, stats_Tk: Tensor, targets_T: Tensor, *shard_and_backend: Any
) -> Tensor:
    *shard, backend = shard_and_backend
    run = select("dlogits", logits_TVp.device, logits_TVp.dtype, backend)
    return run(grad_stats_Tk, stats_Tk, logits_TVp, targets_T, *shard)


def _dlogits_(
    logits_TVp: Tensor, grad_stats_Tk: Tensor, stats_Tk: Tensor, targets_T: Tensor, *shard_and_backend: Any
) -> None:
    _overwrite(logits_TVp)
    *shard, backend = shard_and_backend
    run = select("dlogits", logits_TVp.device, logits_TVp.dtype, backend)
    run(grad_stats_Tk, stats_Tk, logits_TVp, targets_T, *shard, out=logits_TVp)


def _rest_softmax_(logits_TVp: Tensor, targets_T: Tensor, *shard_and_backend: Any) -> Tensor:
    _overwrite(logits_TVp)
    *shard, backend = shard_and_backend
    return select("rest_softmax_", logits_TVp.device, logits_TVp.dtype, backend)(
        logits_TVp, targets_T, *shard
    )


def _rest_softmax_into(
    logits_TVp: Tensor, out_TVp: Tensor, targets_T: Tensor, *shard_and_backend: Any
) -> Tensor:
    _overwrite(logits_TVp)
    _overwrite(out_TVp)
    if out_TVp.shape != logits_TVp.shape or out_TVp.device != logits_TVp.device:
        raise ValueError(
            f"out_TVp: expected {list(logits_TVp.shape)} on {logits_TVp.device} like logits_TVp, "
            f"got {list(out_TVp.shape)} on {out_TVp.device}"
        )
    *shard, backend = shard_and_backend
    run = select("rest_softmax_into", logits_TVp.device, logits_TVp.dtype, backend)
    return run(logits_TVp, out_TVp, targets_T, *shard)


def _fake_rest_softmax_(logits_TVp: Tensor, *_: Any) -> Tensor:
    return logits_TVp.new_empty(logits_TVp.shape[0], num_stats(False), dtype=working_dtype(logits_TVp.dtype))


def _log_prob_dlogits_(
    logits_TVp: Tensor, targets_T: Tensor, weights_T: Tensor, *shard_and_backend: Any
) -> Tensor:
    _overwrite(logits_TVp)
    *shard, backend = shard_and_backend
    return select("log_prob_dlogits_", logits_TVp.device, logits_TVp.dtype, backend)(
        logits_TVp, targets_T, weights_T, *shard
    )


def _fake_log_prob_dlogits_(logits_TVp: Tensor, *_: Any) -> Tensor:
    return logits_TVp.new_empty(logits_TVp.shape[0], dtype=working_dtype(logits_TVp.dtype))


def _join_stats(stats_RTk: Tensor, inv_temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return select("join_stats", stats_RTk.device, stats_RTk.dtype, backend)(stats_RTk, inv_temperature)


def _fake_join_stats(
    stats_RTk: Tensor, inv_temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    num_ranks, num_tokens, _ = stats_RTk.shape
    return (
        stats_RTk.new_empty(num_tokens),
        stats_RTk.new_empty(num_tokens),
        stats_RTk.new_empty(num_ranks, num_tokens),
    )


def _join_backward(
    stats_RTk: Tensor,
    rank: int,
    inv_temperature: float,
    grad_log_probs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    backend: str,
) -> Tensor:
    run = select("join_backward", stats_RTk.device, stats_RTk.dtype, backend)
    return run(stats_RTk, rank, inv_temperature, grad_log_probs_T, grad_entropy_T)


def _sequence_sums(values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return select("sequence_sums", values_T.device, values_T.dtype, backend)(values_T, mask_T, cu_seqlens)


def _fake_sequence_sums(values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return values_T.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float64)


def _check_pair(student_TVp: Tensor, teacher_TVp: Tensor) -> None:
    """Raise ValueError if the two rows of a divergence differ in shape, dtype or device."""
    if (student_TVp.shape, student_TVp.dtype, student_TVp.device) != (
        teacher_TVp.shape,
        teacher_TVp.dtype,
        teacher_TVp.device,
    ):
        raise ValueError(
            f"teacher_TVp: expected {list(student_TVp.shape)} {student_TVp.dtype} on {student_TVp.device} like "
            f"student_TVp, got {list(teacher_TVp.shape)} {teacher_TVp.dtype} on {teacher_TVp.device}"
        )


def _kl_stats(
    student_TVp: Tensor, teacher_TVp: Tensor, inv_temperature: float, num_columns: int, backend: str
) -> Tensor:
    _check_pair(student_TVp, teacher_TVp)
    run = select("kl_stats", student_TVp.device, student_TVp.dtype, backend)
    return run(student_TVp, teacher_TVp, inv_temperature, num_columns)


def _fake_kl_stats(student_TVp: Tensor, *_: Any) -> Tensor:
    return student_TVp.new_empty(student_TVp.shape[0], 5, dtype=working_dtype(student_TVp.dtype))


def _jsd_stats(student_TVp: Tensor, teacher_TVp: Tensor, norms_Tk: Tensor, *shape_and_backend: Any) -> Tensor:
    _check_pair(student_TVp, teacher_TVp)
    *shape, backend = shape_and_backend
    run = select("jsd_stats", student_TVp.device, student_TVp.dtype, backend)
    return run(student_TVp, teacher_TVp, norms_Tk, *shape)


def _kl_dlogits_(
    student_TVp: Tensor,
    teacher_TVp: Tensor,
    norms_Tk: Tensor,
    scale_T: Tensor,
    student_kl_T: Tensor,
    *shape_and_backend: Any,
) -> None:
    _check_pair(student_TVp, teacher_TVp)
    _overwrite(student_TVp)
    *shape, backend = shape_and_backend
    run = select("kl_dlogits_", student_TVp.device, student_TVp.dtype, backend)
    run(student_TVp, teacher_TVp, norms_Tk, scale_T, student_kl_T, *shape)


# Reduce rows to their target-excluded statistics.
_register(
    f"log_prob_stats(Tensor logits_TVp, Tensor targets_T, {SHARD}, bool with_entropy, str backend) -> Tensor",
    _log_prob_stats,
    _fake_log_prob_stats,
)
# log_prob_stats and log p [T]; the rank must hold the whole vocabulary.
_register(
    f"scored_stats(Tensor logits_TVp, Tensor targets_T, {SHARD}, bool with_entropy, str backend) -> (Tensor, "
    "Tensor)",
    _scored_stats,
    _fake_scored_stats,
)
# The gradient of the statistics with respect to the logits, in their dtype; dlogits_ overwrites the logits
# with it.
_register(
    f"dlogits(Tensor logits_TVp, Tensor grad_stats_Tk, Tensor stats_Tk, Tensor targets_T, {SHARD}, str "
    "backend) -> Tensor",
    _dlogits,
    lambda logits_TVp, *_: torch.empty_like(logits_TVp),
)
_register(
    f"dlogits_(Tensor(a!) logits_TVp, Tensor grad_stats_Tk, Tensor stats_Tk, Tensor targets_T, {SHARD}, str "
    "backend) -> ()",
    _dlogits_,
    lambda *_: None,
)
# Overwrite the logits with the softmax over the rest and -1 at the target; return their statistics.
_register(
    f"rest_softmax_(Tensor(a!) logits_TVp, Tensor targets_T, {SHARD}, str backend) -> Tensor",
    _rest_softmax_,
    _fake_rest_softmax_,
)
# rest_softmax_ written to rows of another dtype; the values of the logits are lost.
_register(
    f"rest_softmax_into(Tensor(a!) logits_TVp, Tensor(b!) out_TVp, Tensor targets_T, {SHARD}, str backend) "
    "-> Tensor",
    _rest_softmax_into,
    _fake_rest_softmax_,
)
# Overwrite the logits of the whole vocabulary with the gradient of sum_t w_t log p_t; return log p [T].
_register(
    f"log_prob_dlogits_(Tensor(a!) logits_TVp, Tensor targets_T, Tensor weights_T, {SHARD}, str backend) -> "
    "Tensor",
    _log_prob_dlogits_,
    _fake_log_prob_dlogits_,
)
# Compute log p [T], 1 - p [T] and the ranks' shares [R, T] from all ranks' statistics.
_register(
    "join_stats(Tensor stats_RTk, float inv_temperature, str backend) -> (Tensor, Tensor, Tensor)",
    _join_stats,
    _fake_join_stats,
)
# Return the gradient [T, k] of log p and entropy with respect to one rank's statistics.
_register(
    "join_backward(Tensor stats_RTk, int rank, float inv_temperature, Tensor? grad_log_probs_T, Tensor? "
    "grad_entropy_T, "
    "str backend) -> Tensor",
    _join_backward,
    lambda stats_RTk, *_: torch.empty_like(stats_RTk[0]),
)
# Sum the unmasked values of each packed sequence in float64: [S].
_register(
    "sequence_sums(Tensor values_T, Tensor mask_T, Tensor cu_seqlens, str backend) -> Tensor",
    _sequence_sums,
    _fake_sequence_sums,
)
# Reduce the rows of a student and a teacher to the normalisers of both and the mean gap between them.
_register(
    "kl_stats(Tensor student_TVp, Tensor teacher_TVp, float inv_temperature, SymInt num_columns, str backend) "
    "-> Tensor",
    _kl_stats,
    _fake_kl_stats,
)
# Return this rank's part of the two divergences from the mixture, [T, 2].
_register(
    "jsd_stats(Tensor student_TVp, Tensor teacher_TVp, Tensor norms_Tk, float inv_temperature, SymInt "
    "num_columns, float beta, str backend) -> Tensor",
    _jsd_stats,
    lambda student_TVp, teacher_TVp, norms_Tk, *_: norms_Tk.new_empty(student_TVp.shape[0], 2),
)
# Overwrite the student's logits with the scaled gradient of each row's divergence from the teacher.
_register(
    "kl_dlogits_(Tensor(a!) student_TVp, Tensor teacher_TVp, Tensor norms_Tk, Tensor scale_T, Tensor "
    "student_kl_T, float inv_temperature, SymInt num_columns, float beta, str backend) -> ()",
    _kl_dlogits_,
    lambda *_: None,
)
