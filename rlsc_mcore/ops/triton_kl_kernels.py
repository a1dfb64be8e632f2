# mypy: disable-error-code=no-untyped-def
"""Divergence between teacher and student rows as Triton kernels; reference.py defines what they compute.

NaN must propagate: a maximum ignores it, the sums keep it, and every test for an absent value compares with 0
or -inf exactly.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # initial running maximum; finite to prevent inf - inf


@triton.jit
def _log_add_exp(x, y):
    """Return log(exp(x) + exp(y)) for finite x."""
    largest = tl.maximum(x, y)
    return largest + tl.log(tl.exp(x - largest) + tl.exp(y - largest))


@triton.jit
def _log_softmax(x, top, log_sum, inv_temperature):
    log_value = (x - top) * inv_temperature - log_sum
    log_value = tl.where(x == float("-inf"), float("-inf"), log_value)
    return tl.where(log_sum == float("-inf"), float("-inf"), log_value)


@triton.jit
def _to_mixture(log_own, log_other, log_own_share, log_other_share):
    """Return log(own / m) with m = own_share own + other_share other; 0 where own is 0."""
    offset = log_other_share + log_other - log_own
    ratio = 0.0 - _log_add_exp(tl.zeros_like(offset) + log_own_share, offset)
    return tl.where(log_own == float("-inf"), 0.0, ratio)


@triton.jit
def kl_stats_kernel(
    student, student_stride, teacher, teacher_stride, stats, inv_temperature, num_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """kl_stats: one pair of rows per program, one read of each."""
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = student + row * student_stride, teacher + row * teacher_stride
    x_top, y_top = tl.full([1], LOWEST, tl.float32), tl.full([1], LOWEST, tl.float32)
    x_total, y_total = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    for begin in range(0, num_columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)[None, :]
        inside = at < num_columns
        x = tl.load(x_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(y_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        new_x_top, new_y_top = tl.maximum(x_top, tl.max(x, 1)), tl.maximum(y_top, tl.max(y, 1))
        x_drop, y_drop = (x_top - new_x_top) * inv_temperature, (y_top - new_y_top) * inv_temperature
        x_depth, y_depth = (
            (x - new_x_top[:, None]) * inv_temperature,
            (y - new_y_top[:, None]) * inv_temperature,
        )
        exps = tl.exp(y_depth)
        x_total = x_total * tl.exp(x_drop) + tl.sum(tl.exp(x_depth), 1)
        # The gaps summed so far are relative to the old maxima.
        moved = tl.where(y_total == 0, weighted, weighted + y_total * (y_drop - x_drop))
        weighted = moved * tl.exp(y_drop) + tl.sum(tl.where(exps == 0, 0.0, exps * (y_depth - x_depth)), 1)
        y_total = y_total * tl.exp(y_drop) + tl.sum(exps, 1)
        x_top, y_top = new_x_top, new_y_top
    one = tl.arange(0, 1)
    out = stats + row * 5 + one
    tl.store(out, tl.where(x_total == 0, float("-inf"), x_top))
    tl.store(out + 1, tl.where(x_total == 0, float("-inf"), tl.log(x_total)))
    tl.store(out + 2, tl.where(y_total == 0, float("-inf"), y_top))
    tl.store(out + 3, tl.where(y_total == 0, float("-inf"), tl.log(y_total)))
    tl.store(out + 4, tl.where(y_total == 0, 0.0, weighted / y_total))


@triton.jit
def jsd_stats_kernel(
    student, student_stride, teacher, teacher_stride, norms, sums, inv_temperature, num_columns, log_beta,
    log_rest, BLOCK: tl.constexpr,
):  # fmt: skip
    """jsd_stats: one pair of rows per program, one read of each."""
    row = tl.program_id(0).to(tl.int64)
    norm = norms + row * 4
    x_top, x_log_sum = tl.load(norm), tl.load(norm + 1)
    y_top, y_log_sum = tl.load(norm + 2), tl.load(norm + 3)
    student_sum, teacher_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, num_columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < num_columns
        x = tl.load(student + row * student_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(teacher + row * teacher_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        log_q = _log_softmax(x, x_top, x_log_sum, inv_temperature)
        log_p = _log_softmax(y, y_top, y_log_sum, inv_temperature)
        student_sum += tl.exp(log_q) * _to_mixture(log_q, log_p, log_rest, log_beta)
        teacher_sum += tl.exp(log_p) * _to_mixture(log_p, log_q, log_beta, log_rest)
    tl.store(sums + row * 2, tl.sum(student_sum, 0))
    tl.store(sums + row * 2 + 1, tl.sum(teacher_sum, 0))


@triton.jit
def kl_dlogits_kernel(
    student, student_stride, teacher, teacher_stride, norms, scales, student_kls, inv_temperature, num_columns,
    row_columns, log_beta, log_rest, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """kl_dlogits_: one block of a row per program; overwrites the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    x_at = student + row * student_stride + at
    x = tl.load(x_at, mask=inside, other=float("-inf")).to(tl.float32)
    y = tl.load(teacher + row * teacher_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    norm = norms + row * 4
    log_q = _log_softmax(x, tl.load(norm), tl.load(norm + 1), inv_temperature)
    log_p = _log_softmax(y, tl.load(norm + 2), tl.load(norm + 3), inv_temperature)
    factor = tl.load(scales + row) * inv_temperature
    if MIXED:
        excess = _to_mixture(log_q, log_p, log_rest, log_beta) - tl.load(student_kls + row)
        gradient = tl.exp(log_q) * excess * (factor * tl.exp(log_rest))
    else:
        gradient = (tl.exp(log_q) - tl.exp(log_p)) * factor
    gradient = tl.where(inside, gradient, 0.0)
    tl.store(x_at, gradient.to(student.dtype.element_ty), mask=at < row_columns)
