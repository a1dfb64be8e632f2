"""Define every op of this package in plain PyTorch: test oracle of the kernels and fallback on any device.

Each row of logits x is reduced to *target-excluded* statistics in float32 (float64 for float64 logits). The
"rest" of a row is all real columns of this rank except the target's:

    top      = a number near the largest logit of the rest, as a logit
    log_sum  = log sum_{j != target} exp((x_j - top) / temperature)
    target   = x_target, as a logit; -inf on the ranks that do not hold the target's column
    rest_entropy (optional) = entropy of softmax(x_j / temperature, j != target)

With gap = (top - target) / temperature + log_sum: log p = -softplus(gap) and 1 - p = sigmoid(gap). Without
the target in the sum, both stay accurate for p -> 1, where logsumexp - target cancels. Differences from `top`
stay accurate when all logits share a large offset. An empty rest (no column, or every logit -inf) has
(top, log_sum) = (-inf, -inf).

Rows with a negative target are ignored: statistics (-inf, -inf, 0, 0), log p = 0, gradient exactly 0. In any
other row a NaN or +inf logit gives log p = NaN, as in torch.log_softmax.

Shape suffixes: T tokens (rows of logits), Vp vocabulary columns of this rank with padding, k statistics (3,
or 4 with entropy), R tensor-parallel ranks, S sequences, 1 a dimension of size 1.
"""

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")
LARGEST_GAP = 200.0  # beyond it p or 1 - p is 0 in every dtype; prevents 0 * inf in the entropy
TOP, LOG_SUM, TARGET, REST_ENTROPY = range(4)  # columns of the statistics


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_stats(with_entropy: bool) -> int:
    """Return the number of statistics per row."""
    return 4 if with_entropy else 3


def _owned(targets_T: Tensor, vocab_start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return which rows have their target on this rank (bool [T]), and its local column (int64 [T], 0
    elsewhere)."""
    column_T = targets_T - vocab_start
    owned_T = (targets_T >= 0) & (column_T >= 0) & (column_T < num_columns)
    return owned_T, torch.where(owned_T, column_T, 0)


def log_prob_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> Tensor:
    """Reduce each row to (top, log_sum, target[, rest_entropy]): [T, 3] or [T, 4], for this rank's columns
    only. No collective."""
    ignored_T = targets_T < 0
    shape = logits_TVp.shape[0], num_stats(with_entropy)
    stats = torch.zeros(shape, dtype=working_dtype(logits_TVp.dtype), device=logits_TVp.device)
    if num_columns == 0:
        stats[:, :TARGET] = NEG_INF
        stats[:, TARGET] = torch.where(ignored_T, 0.0, NEG_INF)
        return stats
    x = logits_TVp[:, :num_columns].to(stats.dtype)
    owned_T, column_T = _owned(targets_T, vocab_start, num_columns)
    x_target = x.gather(1, column_T[:, None])
    rest = x.scatter(1, column_T[:, None], torch.where(owned_T[:, None], NEG_INF, x_target))
    top_T = rest.amax(dim=1)
    depth = torch.where(rest == NEG_INF, NEG_INF, (rest - top_T[:, None]) * inv_temperature)
    exps = depth.exp()
    total_T = exps.sum(dim=1)
    stats[:, TOP] = torch.where(ignored_T, NEG_INF, top_T)
    stats[:, LOG_SUM] = torch.where(ignored_T, NEG_INF, total_T.log())
    stats[:, TARGET] = torch.where(ignored_T, 0.0, torch.where(owned_T, x_target[:, 0], NEG_INF))
    if with_entropy:
        weighted_T = (exps * torch.where(depth == NEG_INF, 0.0, depth)).sum(dim=1)
        entropy_T = torch.where(total_T == 0, 0.0, total_T.log() - weighted_T / total_T)
        stats[:, REST_ENTROPY] = torch.where(ignored_T, 0.0, entropy_T)
    return stats


def scored_stats(
    logits_TVp: Tensor,
    targets_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return `log_prob_stats` and log p [T]. The rank must hold the whole vocabulary."""
    stats = log_prob_stats(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, with_entropy)
    return stats, join_stats(stats[None], inv_temperature)[0]


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
    """Return the gradient of `log_prob_stats` with respect to the logits: [T, Vp] in the logits' dtype, 0 in
    padding columns.

    Writes to `out` if given; `out` may be the logits. `top` is treated as a constant and its gradient is
    ignored: results computed from the statistics must not depend on which number near the largest logit it
    is.

    With q = softmax over the rest: dL/dx_j = q_j (g_log_sum - g_entropy (log q_j + rest_entropy)) /
    temperature and dL/dx_target = g_target.
    """
    if num_columns == 0:
        return torch.zeros_like(logits_TVp) if out is None else out.zero_()
    x = logits_TVp[:, :num_columns].to(stats_Tk.dtype)
    owned_T, column_T = _owned(targets_T, vocab_start, num_columns)
    top_T1, log_sum_T1 = stats_Tk[:, TOP, None], stats_Tk[:, LOG_SUM, None]
    is_empty = (log_sum_T1 == NEG_INF) | (x == NEG_INF)
    log_q = torch.where(is_empty, NEG_INF, (x - top_T1) * inv_temperature - log_sum_T1)
    scale = grad_stats_Tk[:, LOG_SUM, None]
    if stats_Tk.shape[1] == num_stats(True):
        finite_log_q = torch.where(is_empty, 0.0, log_q)
        scale = scale - grad_stats_Tk[:, REST_ENTROPY, None] * (
            finite_log_q + stats_Tk[:, REST_ENTROPY, None]
        )
    g = log_q.exp() * scale * inv_temperature
    current = g.gather(1, column_T[:, None])
    g.scatter_(1, column_T[:, None], torch.where(owned_T[:, None], grad_stats_Tk[:, TARGET, None], current))
    grad = torch.empty_like(logits_TVp) if out is None else out
    grad[:, num_columns:] = 0.0
    grad[:, :num_columns] = torch.where((targets_T < 0)[:, None], 0.0, g).to(grad.dtype)
    return grad


def rest_softmax_(
    logits_TVp: Tensor, targets_T: Tensor, inv_temperature: float, vocab_start: int, num_columns: int
) -> Tensor:
    """Overwrite each row with the softmax over the rest and -1 at the target; return the statistics [T, 3].

    Padding columns and ignored rows become 0. On a rank with the whole vocabulary, the gradient of sum_t w_t
    log p_t is row t times -w_t (1 - p_t) / temperature. A weight that is known only after the reduction can
    therefore scale the rows of the two following matrix products instead of the row itself.
    """
    stats = log_prob_stats(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, False)
    dlogits(
        unit_grad_stats(stats, inv_temperature),
        stats,
        logits_TVp,
        targets_T,
        inv_temperature,
        vocab_start,
        num_columns,
        out=logits_TVp,
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
    """Write the result of `rest_softmax_` to `out_TVp`, which may have another float dtype; return the
    statistics. The logits are overwritten with undefined values."""
    stats = rest_softmax_(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns)
    out_TVp.copy_(logits_TVp)
    return stats


def unit_grad_stats(stats_Tk: Tensor, inv_temperature: float) -> Tensor:
    """Return the gradient [T, k] for which `dlogits` gives q in the rest and -1 at the target."""
    unit = torch.zeros_like(stats_Tk)
    unit[:, LOG_SUM], unit[:, TARGET] = 1.0 / inv_temperature, -1.0
    return unit


def weighted_grad_stats(weights_T: Tensor, target_excluded_T: Tensor, inv_temperature: float) -> Tensor:
    """Return the gradient [T, 3] of sum_t w_t log p_t with respect to the statistics. The rank must hold the
    whole vocabulary."""
    slope_T = weights_T.to(target_excluded_T.dtype) * target_excluded_T
    return torch.stack([torch.zeros_like(slope_T), -slope_T, slope_T * inv_temperature], dim=1)


def log_prob_dlogits_(
    logits_TVp: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    inv_temperature: float,
    vocab_start: int,
    num_columns: int,
) -> Tensor:
    """Overwrite the logits with the gradient of sum_t w_t log p_t; return log p [T]. The rank must hold the
    whole vocabulary."""
    stats = log_prob_stats(logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, False)
    log_probs_T, target_excluded_T, _ = join_stats(stats[None], inv_temperature)
    grad_stats = weighted_grad_stats(weights_T, target_excluded_T, inv_temperature)
    dlogits(
        grad_stats, stats, logits_TVp, targets_T, inv_temperature, vocab_start, num_columns, out=logits_TVp
    )
    return log_probs_T


def join_mass(stats_RTk: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the ranks' statistics: return each rank's log mass [R, T] relative to the largest top, their
    logsumexp [T], and the gap [T]."""
    top_RT, log_sum_RT = stats_RTk[:, :, TOP], stats_RTk[:, :, LOG_SUM]
    top_T, target_T = top_RT.amax(dim=0), stats_RTk[:, :, TARGET].amax(dim=0)
    mass_RT = torch.where(log_sum_RT == NEG_INF, NEG_INF, (top_RT - top_T) * inv_temperature + log_sum_RT)
    total_T = torch.logsumexp(mass_RT, dim=0)
    gap_T = (top_T - target_T) * inv_temperature + total_T
    return mass_RT, total_T, torch.where(target_T == float("inf"), float("nan"), gap_T)


def join_stats(stats_RTk: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log p [T], 1 - p [T] and each rank's share [R, T] of the mass outside the target from all
    ranks' statistics."""
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    shares_RT = torch.where(mass_RT == NEG_INF, 0.0, (mass_RT - total_T).exp())
    return 0.0 - softplus(gap_T), torch.sigmoid(gap_T), shares_RT


def join_backward(
    stats_RTk: Tensor,
    rank: int,
    inv_temperature: float,
    grad_log_probs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
) -> Tensor:
    """Return the gradient [T, k] of log p and entropy with respect to the statistics of `rank`; 0 for top
    (see dlogits).

    The target's gradient is the same on every rank. A rank that does not hold the target has no element to
    write it to.
    """
    mass_RT, total_T, gap_T = join_mass(stats_RTk, inv_temperature)
    q_T = torch.sigmoid(gap_T)
    log_shares_RT = torch.where(mass_RT == NEG_INF, NEG_INF, mass_RT - total_T)
    share_T = log_shares_RT[rank].exp()
    grad = torch.zeros_like(stats_RTk[rank])
    if grad_log_probs_T is not None:
        slope_T = grad_log_probs_T.to(grad.dtype) * q_T
        grad[:, LOG_SUM] -= slope_T * share_T
        grad[:, TARGET] += slope_T * inv_temperature
    if grad_entropy_T is not None and stats_RTk.shape[2] == num_stats(True):
        rest_entropy_T = joined_rest_entropy(stats_RTk, log_shares_RT)
        p_T = torch.sigmoid(-gap_T)
        toward_rest_T = p_T * (rest_entropy_T - gap_T.clamp(-LARGEST_GAP, LARGEST_GAP))
        finite_log_share_T = torch.where(share_T == 0, 0.0, log_shares_RT[rank])
        surprise_T = finite_log_share_T - stats_RTk[rank, :, REST_ENTROPY] + rest_entropy_T
        slope_T = grad_entropy_T.to(grad.dtype) * q_T
        grad[:, LOG_SUM] += slope_T * share_T * (toward_rest_T - surprise_T)
        grad[:, TARGET] -= slope_T * toward_rest_T * inv_temperature
        grad[:, REST_ENTROPY] += slope_T * share_T
    return grad


def joined_rest_entropy(stats_RTk: Tensor, log_shares_RT: Tensor) -> Tensor:
    """Return the entropy [T] of the softmax over the rest of all ranks: sum_r share_r (rest_entropy_r - log
    share_r)."""
    shares_RT = log_shares_RT.exp()
    finite_RT = torch.where(shares_RT == 0, 0.0, log_shares_RT)
    return (shares_RT * (stats_RTk[:, :, REST_ENTROPY] - finite_RT)).sum(dim=0)


def softplus(gap_T: Tensor) -> Tensor:
    """Return log(1 + exp(gap)) without torch's linear approximation above 20."""
    return torch.clamp_min(gap_T, 0.0) + torch.log1p(torch.exp(-gap_T.abs()))


def sequence_sums(values_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum the unmasked values of each packed sequence in token order: float64 [S]; 0 for an empty
    sequence."""
    live = torch.where(mask_T, values_T.double(), 0.0)
    return torch.segment_reduce(live, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)


# Divergences between the rows of a teacher and of a student. With log q = log softmax(student / temperature)
# and log p = log softmax(teacher / temperature), over the real columns of all ranks:
#
#     forward KL        KL(p || q)
#     beta in (0, 1)    JSD = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
#
# beta = 0 selects the forward KL.
STUDENT_TOP, STUDENT_LOG_SUM, TEACHER_TOP, TEACHER_LOG_SUM, TEACHER_GAP = range(5)
ELEMENTS_AT_ONCE = 1 << 18  # of a block of rows on a CPU, whose temporaries then stay in its cache


def _row_blocks(rows_TVp: Tensor) -> list[slice]:
    num_rows, num_columns = rows_TVp.shape
    size = max(ELEMENTS_AT_ONCE // max(num_columns, 1), 1) if rows_TVp.device.type == "cpu" else num_rows
    return [slice(start, start + size) for start in range(0, num_rows, max(size, 1))]


def _depths(x: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Return the largest element [T] of each row and the tempered differences from it, [T, V]."""
    top_T = x.amax(dim=1)
    return top_T, torch.where(x == NEG_INF, NEG_INF, (x - top_T[:, None]) * inv_temperature)


def kl_stats(student_TVp: Tensor, teacher_TVp: Tensor, inv_temperature: float, num_columns: int) -> Tensor:
    """Reduce each pair of rows to (top, log_sum) of the student, of the teacher, and the gap: [T, 5].

    Only this rank's real columns count. log_sum is relative to top, as in `log_prob_stats`. The gap is the
    mean of (y - teacher top - x + student top) / temperature under the softmax of this rank's teacher logits
    y. A row without a finite logit has (top, log_sum) = (-inf, -inf) and gap 0. No collective.
    """
    shape = student_TVp.shape[0], 5
    stats = torch.zeros(shape, dtype=working_dtype(student_TVp.dtype), device=student_TVp.device)
    if num_columns == 0:
        stats[:, :TEACHER_GAP] = NEG_INF
        return stats
    for rows in _row_blocks(student_TVp):
        top_T, depth = _depths(student_TVp[rows, :num_columns].to(stats.dtype), inv_temperature)
        stats[rows, STUDENT_TOP], stats[rows, STUDENT_LOG_SUM] = top_T, depth.exp().sum(dim=1).log()
        top_T, teacher_depth = _depths(teacher_TVp[rows, :num_columns].to(stats.dtype), inv_temperature)
        exps = teacher_depth.exp()
        total_T = exps.sum(dim=1)
        stats[rows, TEACHER_TOP], stats[rows, TEACHER_LOG_SUM] = top_T, total_T.log()
        weighted_T = torch.where(exps == 0, 0.0, exps * (teacher_depth - depth)).sum(dim=1)
        stats[rows, TEACHER_GAP] = torch.where(total_T == 0, 0.0, weighted_T / total_T)
    return stats


def join_kl(stats_RTk: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Combine all ranks' `kl_stats`: return (top, log_sum) of student and teacher over the whole vocabulary,
    [T, 4], and the forward KL [T]."""
    norms, relative = [], []
    for top, log_sum in ((STUDENT_TOP, STUDENT_LOG_SUM), (TEACHER_TOP, TEACHER_LOG_SUM)):
        top_RT, log_sum_RT = stats_RTk[:, :, top], stats_RTk[:, :, log_sum]
        top_T = top_RT.amax(dim=0)
        shift_RT = torch.where(top_RT == NEG_INF, 0.0, (top_RT - top_T) * inv_temperature)
        mass_RT = torch.where(log_sum_RT == NEG_INF, NEG_INF, shift_RT + log_sum_RT)
        norms += [top_T, torch.logsumexp(mass_RT, dim=0)]
        relative += [shift_RT, mass_RT]
    student_shift, _, teacher_shift, teacher_mass = relative
    share_RT = torch.where(teacher_mass == NEG_INF, 0.0, (teacher_mass - norms[TEACHER_LOG_SUM]).exp())
    gap_RT = stats_RTk[:, :, TEACHER_GAP] + teacher_shift - student_shift
    gap_T = torch.where(share_RT == 0, 0.0, share_RT * gap_RT).sum(dim=0)
    return torch.stack(norms, dim=1), gap_T + norms[STUDENT_LOG_SUM] - norms[TEACHER_LOG_SUM]


def _log_softmax_of(x: Tensor, top_T: Tensor, log_sum_T: Tensor, inv_temperature: float) -> Tensor:
    is_zero = (x == NEG_INF) | (log_sum_T == NEG_INF)[:, None]
    return torch.where(is_zero, NEG_INF, (x - top_T[:, None]) * inv_temperature - log_sum_T[:, None])


def _both_log_softmax(
    student: Tensor, teacher: Tensor, norms_Tk: Tensor, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (log q, log p) of a block of rows from `join_kl`'s norms."""
    dtype = norms_Tk.dtype
    log_q = _log_softmax_of(student.to(dtype), norms_Tk[:, 0], norms_Tk[:, 1], inv_temperature)
    log_p = _log_softmax_of(teacher.to(dtype), norms_Tk[:, 2], norms_Tk[:, 3], inv_temperature)
    return log_q, log_p


def _to_mixture(log_own: Tensor, log_other: Tensor, own_share: float) -> Tensor:
    """Return log(own / m) with m = own_share own + (1 - own_share) other; 0 where own is 0."""
    offset = math.log1p(-own_share) + log_other - log_own
    ratio = -torch.logaddexp(torch.full_like(offset, math.log(own_share)), offset)
    return torch.where(log_own == NEG_INF, 0.0, ratio)


def jsd_stats(
    student_TVp: Tensor,
    teacher_TVp: Tensor,
    norms_Tk: Tensor,
    inv_temperature: float,
    num_columns: int,
    beta: float,
) -> Tensor:
    """Return this rank's part of (KL(q || m), KL(p || m)): [T, 2]; the sum over the ranks is the whole."""
    sums = torch.zeros(student_TVp.shape[0], 2, dtype=norms_Tk.dtype, device=student_TVp.device)
    for rows in _row_blocks(student_TVp):
        log_q, log_p = _both_log_softmax(
            student_TVp[rows, :num_columns], teacher_TVp[rows, :num_columns], norms_Tk[rows], inv_temperature
        )
        sums[rows, 0] = (log_q.exp() * _to_mixture(log_q, log_p, 1 - beta)).sum(dim=1)
        sums[rows, 1] = (log_p.exp() * _to_mixture(log_p, log_q, beta)).sum(dim=1)
    return sums


def kl_dlogits_(
    student_TVp: Tensor,
    teacher_TVp: Tensor,
    norms_Tk: Tensor,
    scale_T: Tensor,
    student_kl_T: Tensor,
    inv_temperature: float,
    num_columns: int,
    beta: float,
) -> None:
    """Overwrite the student's logits with scale_t times the gradient of the row's divergence, 0 in padding
    columns.

    Forward KL: (q_j - p_j) / temperature. JSD: (1 - beta) q_j (log(q_j / m_j) - KL(q || m)) / temperature,
    with `student_kl_T` = KL(q || m) over all ranks.
    """
    factor_T = scale_T.to(norms_Tk.dtype) * inv_temperature * (1 - beta)
    for rows in _row_blocks(student_TVp):
        log_q, log_p = _both_log_softmax(
            student_TVp[rows, :num_columns], teacher_TVp[rows, :num_columns], norms_Tk[rows], inv_temperature
        )
        if beta == 0:
            gradient = log_q.exp() - log_p.exp()
        else:
            gradient = log_q.exp() * (_to_mixture(log_q, log_p, 1 - beta) - student_kl_T[rows, None])
        student_TVp[rows, :num_columns] = (gradient * factor_T[rows, None]).to(student_TVp.dtype)
    student_TVp[:, num_columns:] = 0.0
