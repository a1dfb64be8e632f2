# mypy: disable-error-code=no-untyped-def
"""Row ops as Triton kernels, for CUDA GPUs from sm_80 on and for Triton's interpreter on a CPU
(TRITON_INTERPRET=1).

Exponents are in base 2: 2^(x * scale - top) with scale = log2(e) / temperature takes one fused multiply-add
and one power instruction. `top` is rounded once per maximum; fused_multiply_add computes the rounding error,
so a common offset of the logits does not reduce accuracy. The target is excluded from every sum (see
reference.py). NaN must propagate: a maximum ignores it, the sums keep it, and every test for an empty rest
compares with 0 or -inf exactly.
"""

import os

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # initial running maximum; finite to prevent inf - inf
LARGEST_GAP: tl.constexpr = tl.constexpr(200.0)  # see reference.py
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def fused_multiply_add(x, y, z):
    """Return x * y + z with one rounding. The interpreter rounds the product too, so it computes in
    float64."""
    if INTERPRETED:
        result = (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def _log1p(y):
    """Return log(1 + y) for y in [0, 1] in full float32 accuracy, also for tiny y: 2 atanh(y / (2 + y)) as a
    series."""
    s = y / (2.0 + y)
    t = s * s
    series = 1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15))
    series = 1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9 + t * series))
    return 2.0 * s * (1.0 + t * (1.0 / 3 + t * series))


@triton.jit
def _log_prob(gap, target):
    """Return (log p, 1 - p) from gap, the rest's log mass minus the target's tempered logit; NaN if the
    target is +inf, as in log_softmax."""
    gap = tl.where(target == float("inf"), float("nan"), gap)
    y = tl.exp(-tl.abs(gap))
    log_p = 0.0 - (tl.maximum(gap, 0.0) + _log1p(y))
    return log_p, tl.where(gap >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def _local_column(target, vocab_start, num_columns):
    """Return the target's column on this rank as int32, -1 if another rank holds it. A 64-bit comparison
    would take two instructions."""
    column = target - vocab_start
    return tl.where((column >= 0) & (column < num_columns), column, -1).to(tl.int32)


@triton.jit
def _target_logit(row_ptr, column):
    """Return the target's logit if this rank holds it, else -inf."""
    return tl.load(row_ptr + column, mask=column >= 0, other=float("-inf")).to(tl.float32)


@triton.jit
def _accumulate(x, largest, total, weighted, scale, WITH_ENTROPY: tl.constexpr):
    """Add x [UNROLL, BLOCK] to each lane's running values: (largest logit, sum of 2^depth, sum of 2^depth *
    depth)."""
    new_largest = tl.maximum(largest, tl.max(x, 0))
    top = new_largest * scale
    drop = largest * scale - top
    depth = fused_multiply_add(x, scale, -top[None, :])
    e = tl.exp2(depth)
    factor = tl.exp2(drop)
    if WITH_ENTROPY:
        moved = fused_multiply_add(drop, total, weighted)
        weighted = fused_multiply_add(factor, moved, tl.sum(e * tl.where(e > 0, depth, 0.0), 0))
    total = fused_multiply_add(total, factor, tl.sum(e, 0))
    return new_largest, total, weighted


@triton.jit
def stats_kernel(
    logits, row_stride, targets, stats, log_probs, inv_temperature, vocab_start, num_columns,
    NUM_STATS: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """log_prob_stats: one row per program and one read. Each of BLOCK lanes keeps its own (maximum, sum);
    they are combined once at the end.

    SCORED: the rank holds the whole vocabulary, and log p is written too.
    """
    STEP: tl.constexpr = BLOCK * UNROLL
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    out = stats + row * NUM_STATS
    if target < 0:
        tl.store(out, float("-inf"))
        tl.store(out + 1, float("-inf"))
        tl.store(out + 2, 0.0)
        if NUM_STATS == 4:
            tl.store(out + 3, 0.0)
        if SCORED:
            tl.store(log_probs + row, 0.0)
        return
    row_ptr = logits + row * row_stride
    column = _local_column(target, vocab_start, num_columns)
    scale = inv_temperature * LOG2E
    offsets = tl.arange(0, UNROLL)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    full = num_columns // STEP * STEP
    for begin in range(
        0, full, STEP
    ):  # no mask: a masked column would make every load of the step 2 bytes long
        x = tl.load(row_ptr + begin + offsets, eviction_policy="evict_first").to(tl.float32)
        if (column >= begin) & (column < begin + STEP):
            x = tl.where(begin + offsets == column, float("-inf"), x)
        largest, total, weighted = _accumulate(x, largest, total, weighted, scale, NUM_STATS == 4)
    # The remaining columns, one block at a time: lanes without a column cost as much as lanes with one.
    lane = tl.arange(0, BLOCK)[None, :]
    full_blocks = num_columns // BLOCK * BLOCK
    for begin in range(full, full_blocks, BLOCK):
        x = tl.load(row_ptr + begin + lane, eviction_policy="evict_first").to(tl.float32)
        x = tl.where(begin + lane == column, float("-inf"), x)
        largest, total, weighted = _accumulate(x, largest, total, weighted, scale, NUM_STATS == 4)
    if full_blocks < num_columns:
        at = full_blocks + lane
        x = tl.load(
            row_ptr + at, mask=at < num_columns, other=float("-inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        x = tl.where(at == column, float("-inf"), x)
        largest, total, weighted = _accumulate(x, largest, total, weighted, scale, NUM_STATS == 4)
    row_largest = tl.max(largest, 0)
    top = row_largest * scale
    drop = largest * scale - top
    factor = tl.exp2(drop)
    total_sum = tl.sum(total * factor, 0)
    log2_sum = tl.log2(total_sum)  # -inf if every logit of the rest is -inf
    tl.store(out, tl.where(total_sum == 0, float("-inf"), row_largest))
    tl.store(out + 1, (log2_sum + fused_multiply_add(-row_largest, scale, top)) * LN2)
    x_target = _target_logit(row_ptr, column)
    tl.store(out + 2, x_target)
    if SCORED:
        log_p, _ = _log_prob((fused_multiply_add(-x_target, scale, top) + log2_sum) * LN2, x_target)
        tl.store(log_probs + row, log_p)
    if NUM_STATS == 4:
        weighted_sum = tl.sum(factor * (weighted + drop * total), 0)
        tl.store(out + 3, tl.where(total_sum == 0, 0.0, (log2_sum - weighted_sum / total_sum) * LN2))


@triton.jit
def _rest_gradient(
    x, scale, top, log2_factor, rest_scale, entropy_scale, rest_entropy, WITH_ENTROPY: tl.constexpr
):
    """Return dlogits of the rest at x: q * (rest_scale - entropy_scale * (log q + rest_entropy))."""
    log2_q = fused_multiply_add(x, scale, -top) + log2_factor
    g = rest_scale
    if WITH_ENTROPY:
        g = rest_scale - entropy_scale * (tl.where(log2_q > LOWEST, log2_q * LN2, 0.0) + rest_entropy)
    return tl.exp2(log2_q) * g


@triton.jit
def dlogits_kernel(
    grad_stats, stats, logits, row_stride, targets, out, out_stride, inv_temperature, vocab_start, num_columns, row_columns,
    NUM_STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits, one block of a row per program; `out` may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    out_ptr = out + row * out_stride + at
    if target < 0:
        tl.store(out_ptr, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < row_columns)
        return
    scale = inv_temperature * LOG2E
    largest = tl.load(stats + row * NUM_STATS)
    log_sum = tl.load(stats + row * NUM_STATS + 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    top = largest * scale
    # An empty rest has q = 0: its logits are -inf, so any finite factor is correct.
    log2_factor = tl.where(
        log_sum == float("-inf"), 0.0, fused_multiply_add(-largest, scale, top) - log_sum * LOG2E
    )
    rest_scale = tl.load(grad_stats + row * NUM_STATS + 1) * inv_temperature
    target_value = tl.load(grad_stats + row * NUM_STATS + 2)
    entropy_scale = 0.0
    rest_entropy = 0.0
    if NUM_STATS == 4:
        rest_entropy = tl.load(stats + row * NUM_STATS + 3)
        entropy_scale = tl.load(grad_stats + row * NUM_STATS + 3) * inv_temperature
    column = _local_column(target, vocab_start, num_columns)
    row_ptr = logits + row * row_stride + at
    if begin + BLOCK <= num_columns:  # no mask: see stats_kernel
        x = tl.load(row_ptr).to(tl.float32)
        g = _rest_gradient(
            x, scale, top, log2_factor, rest_scale, entropy_scale, rest_entropy, NUM_STATS == 4
        )
        if (column >= begin) & (column < begin + BLOCK):
            g = tl.where(at == column, target_value, g)
        tl.store(out_ptr, g.to(out.dtype.element_ty))
    else:
        x = tl.load(row_ptr, mask=at < num_columns, other=float("-inf")).to(tl.float32)
        g = _rest_gradient(
            x, scale, top, log2_factor, rest_scale, entropy_scale, rest_entropy, NUM_STATS == 4
        )
        g = tl.where(at == column, target_value, g)
        g = tl.where(at < num_columns, g, 0.0)
        tl.store(out_ptr, g.to(out.dtype.element_ty), mask=at < row_columns)


@triton.jit
def _load_rest(row_ptr, at, column, num_columns, MASKED: tl.constexpr):
    """Load a tile of a row, with -inf at the target."""
    if MASKED:
        x = tl.load(row_ptr + at, mask=at < num_columns, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + at).to(tl.float32)
    return tl.where(at == column, float("-inf"), x)


@triton.jit
def _store_tile(row_ptr, at, values, num_columns, row_columns, MASKED: tl.constexpr):
    """Overwrite a tile; padding columns become 0 for any values of the row."""
    if MASKED:
        values = tl.where(at < num_columns, values, 0.0)
        tl.store(row_ptr + at, values.to(row_ptr.dtype.element_ty), mask=at < row_columns)
    else:
        tl.store(row_ptr + at, values.to(row_ptr.dtype.element_ty))


@triton.jit
def row_kernel(
    logits, row_stride, targets, weights, stats, log_probs, inv_temperature, vocab_start, num_columns, row_columns,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Overwrite a whole row held in one program's registers: one read and one write, at most MAX_ROW columns.

    With REST the row is a tile of BLOCK columns and a masked tile of REST columns; one tile of the next power
    of two could be half empty. FULL: the first tile has no padding and needs no mask.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    row_ptr = logits + row * row_stride
    target = tl.load(targets + row)
    if target < 0:
        _store_tile(row_ptr, at, tl.zeros([BLOCK], tl.float32), num_columns, row_columns, True)
        if REST > 0:
            _store_tile(
                row_ptr,
                BLOCK + tl.arange(0, REST),
                tl.zeros([REST], tl.float32),
                num_columns,
                row_columns,
                True,
            )
        if WEIGHTED:
            tl.store(log_probs + row, 0.0)
        else:
            tl.store(stats + row * 3, float("-inf"))
            tl.store(stats + row * 3 + 1, float("-inf"))
            tl.store(stats + row * 3 + 2, 0.0)
        return
    column = _local_column(target, vocab_start, num_columns)
    scale = inv_temperature * LOG2E
    x_target = _target_logit(row_ptr, column)
    x = _load_rest(row_ptr, at, column, num_columns, not FULL)
    largest = tl.maximum(tl.max(x, 0), LOWEST)
    if REST > 0:
        at_rest = BLOCK + tl.arange(0, REST)
        x_rest = _load_rest(row_ptr, at_rest, column, num_columns, True)
        largest = tl.maximum(largest, tl.max(x_rest, 0))
    top = largest * scale
    e = tl.exp2(fused_multiply_add(x, scale, -top))
    total = tl.sum(e, 0)
    if REST > 0:
        e_rest = tl.exp2(fused_multiply_add(x_rest, scale, -top))
        total += tl.sum(e_rest, 0)
    log2_sum = tl.log2(total)
    rest_scale = 1.0 / tl.where(total == 0, 1.0, total)
    target_value = -1.0
    if WEIGHTED:
        log_p, q = _log_prob((fused_multiply_add(-x_target, scale, top) + log2_sum) * LN2, x_target)
        slope = tl.load(weights + row) * q * inv_temperature
        rest_scale = -slope * rest_scale
        target_value = slope
        tl.store(log_probs + row, log_p)
    else:
        tl.store(stats + row * 3, tl.where(total == 0, float("-inf"), largest))
        tl.store(stats + row * 3 + 1, (log2_sum + fused_multiply_add(-largest, scale, top)) * LN2)
        tl.store(stats + row * 3 + 2, x_target)
    _store_tile(row_ptr, at, e * rest_scale, num_columns, row_columns, not FULL)
    if REST > 0:
        _store_tile(row_ptr, at_rest, e_rest * rest_scale, num_columns, row_columns, True)
    tl.debug_barrier()  # another thread has written the target's element with its tile
    tl.store(row_ptr + column, target_value, mask=column >= 0)


@triton.jit
def _rank_stats(stats, rank, token, num_tokens, live, NUM_STATS: tl.constexpr):
    """Load (top, log_sum, target) of a block of tokens of one rank."""
    at = stats + (rank * num_tokens + token) * NUM_STATS
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )


@triton.jit
def _mass(top, log_sum, joined_top, inv_temperature):
    """Return a rank's sum of exponentials relative to the largest top: at most its number of columns, 0 for
    an empty rest."""
    return tl.where(log_sum == float("-inf"), 0.0, tl.exp((top - joined_top) * inv_temperature + log_sum))


@triton.jit
def _join_ranks(
    stats,
    token,
    num_tokens,
    live,
    inv_temperature,
    NUM_RANKS: tl.constexpr,
    NUM_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine all ranks of a block of tokens: return (largest top, sum of their masses, the target's
    logit)."""
    joined_top = tl.full([BLOCK], float("-inf"), tl.float32)
    target = tl.full([BLOCK], float("-inf"), tl.float32)
    for rank in tl.static_range(NUM_RANKS):
        top, _, own_target = _rank_stats(stats, rank, token, num_tokens, live, NUM_STATS)
        joined_top = tl.maximum(joined_top, top)
        target = tl.where(own_target == float("-inf"), target, own_target)  # a maximum would ignore NaN
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(NUM_RANKS):
        top, log_sum, _ = _rank_stats(stats, rank, token, num_tokens, live, NUM_STATS)
        total += _mass(top, log_sum, joined_top, inv_temperature)
    return joined_top, total, target


@triton.jit
def join_kernel(
    stats, log_probs, target_excluded, shares, num_tokens, inv_temperature,
    NUM_RANKS: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """join_stats, a block of tokens per program: log p, 1 - p and each rank's share of the rest from the
    ranks' statistics."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    joined_top, total, target = _join_ranks(
        stats, token, num_tokens, live, inv_temperature, NUM_RANKS, NUM_STATS, BLOCK
    )
    for rank in tl.static_range(NUM_RANKS):
        top, log_sum, _ = _rank_stats(stats, rank, token, num_tokens, live, NUM_STATS)
        share = _mass(top, log_sum, joined_top, inv_temperature) / tl.where(total == 0, 1.0, total)
        tl.store(shares + rank * num_tokens + token, share, mask=live)
    log_p, q = _log_prob((joined_top - target) * inv_temperature + tl.log(total), target)
    tl.store(log_probs + token, log_p, mask=live)
    tl.store(target_excluded + token, q, mask=live)


@triton.jit
def join_backward_kernel(
    stats, grad_log_probs, grad_entropy, grad_stats, num_tokens, rank, inv_temperature,
    NUM_RANKS: tl.constexpr, NUM_STATS: tl.constexpr, HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """join_backward, a block of tokens per program: the gradient of log p and entropy with respect to one
    rank's statistics."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    joined_top, total, target = _join_ranks(
        stats, token, num_tokens, live, inv_temperature, NUM_RANKS, NUM_STATS, BLOCK
    )
    safe_total = tl.where(total == 0, 1.0, total)
    log_total = tl.log(total)
    gap = (joined_top - target) * inv_temperature + log_total
    _, q = _log_prob(gap, target)
    top, log_sum, _ = _rank_stats(stats, rank, token, num_tokens, live, NUM_STATS)
    share = _mass(top, log_sum, joined_top, inv_temperature) / safe_total
    grad_log_sum = tl.zeros([BLOCK], tl.float32)
    grad_target = tl.zeros([BLOCK], tl.float32)
    out = grad_stats + token * NUM_STATS
    if HAS_LOG_PROBS:
        slope = tl.load(grad_log_probs + token, mask=live, other=0.0).to(tl.float32) * q
        grad_log_sum -= slope * share
        grad_target += slope
    if HAS_ENTROPY:
        rest_entropy = tl.zeros([BLOCK], tl.float32)
        own_log_share = tl.zeros([BLOCK], tl.float32)
        for other in tl.static_range(NUM_RANKS):
            other_top, other_log_sum, _ = _rank_stats(stats, other, token, num_tokens, live, NUM_STATS)
            other_share = _mass(other_top, other_log_sum, joined_top, inv_temperature) / safe_total
            log_share = tl.where(
                other_share == 0, 0.0, (other_top - joined_top) * inv_temperature + other_log_sum - log_total
            )
            entropy = tl.load(stats + (other * num_tokens + token) * NUM_STATS + 3, mask=live, other=0.0)
            rest_entropy += other_share * (entropy - log_share)
            own_log_share = tl.where(rank == other, log_share, own_log_share)
        own_entropy = tl.load(stats + (rank * num_tokens + token) * NUM_STATS + 3, mask=live, other=0.0)
        y = tl.exp(-tl.abs(gap))
        p = tl.where(gap >= 0, y, 1.0) / (1.0 + y)
        near = tl.minimum(tl.maximum(gap, -LARGEST_GAP), LARGEST_GAP)
        toward_rest = p * (rest_entropy - near)
        slope = tl.load(grad_entropy + token, mask=live, other=0.0).to(tl.float32) * q
        grad_log_sum += slope * share * (toward_rest - (own_log_share - own_entropy + rest_entropy))
        grad_target -= slope * toward_rest
        tl.store(out + 3, slope * share, mask=live)
    elif NUM_STATS == 4:
        tl.store(out + 3, tl.zeros([BLOCK], tl.float32), mask=live)
    tl.store(out, tl.zeros([BLOCK], tl.float32), mask=live)
    tl.store(out + 1, grad_log_sum, mask=live)
    tl.store(out + 2, grad_target * inv_temperature, mask=live)


@triton.jit
def sums_kernel(values, mask, cu_seqlens, sums, BLOCK: tl.constexpr):
    """sequence_sums, one sequence per program: float64 lanes in token order, combined once; no atomics.

    A lane loads its value even if the token is masked, so that no load waits for the mask.
    """
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    lanes = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < stop
        live = tl.load(mask + at, mask=inside, other=0) != 0
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float64)
        lanes += tl.where(live, value, 0.0)
    tl.store(sums + sequence, tl.sum(lanes, 0))
