// Compute the row ops of rlsc_mcore/ops/reference.py on a CPU: each row is read once, in float32 blocks;
// threads process different rows.
#include "../row_ops.h"
#include "block_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace rlsc::cpu {
namespace {

struct Stats {
  float top = kNegInf, log_sum = kNegInf, target = 0.0f, rest_entropy = 0.0f;
};

// Loads the block [begin, begin + n) of a row, with -inf at the target.
template <typename T>
void load_rest(const T* row, int64_t begin, int n, int64_t target, float* out) {
  load(row + begin, out, n);
  if (target >= begin && target < begin + n) out[target - begin] = kNegInf;
}

template <typename T>
float element(const T* row, int64_t column) {
  float value;
  load(row + column, &value, 1);
  return value;
}

// Returns the rest's log mass minus the target's tempered logit; NaN if the target is +inf, as in
// log_softmax.
double gap_of(const Stats& stats, float inv_temperature) {
  const double target = stats.target == -kNegInf ? NAN : double(stats.target);
  return (double(stats.top) - target) * inv_temperature + stats.log_sum;
}

float log_prob_of(double gap) { return float(0.0 - (std::max(gap, 0.0) + std::log1p(std::exp(-std::abs(gap))))); }

// Whether row ops skip this row, and the local column of its target (-1 if another rank holds it).
struct Target {
  bool ignored;
  int64_t column;
  Target(int64_t id, const RowArguments& rows)
      : ignored(id < 0), column(id >= rows.vocab_start && id - rows.vocab_start < rows.num_columns ? id - rows.vocab_start : -1) {}
};

// Returns the shift of a block: 0 if the block has no finite logit, so that a NaN among its -inf is summed
// and not ignored.
float finite_shift(float top) { return top == kNegInf ? 0.0f : top; }

template <typename T>
Stats reduce_row(const T* row, Target target, const RowArguments& rows, bool with_entropy) {
  float block[kBlock];
  float top = kNegInf;
  double sum = 0.0, weighted = 0.0;
  for (int64_t begin = 0; begin < rows.num_columns; begin += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, rows.num_columns - begin));
    load_rest(row, begin, n, target.column, block);
    const float block_top = largest(block, n);
    if (block_top > top) {
      const double drop = top == kNegInf ? 0.0 : (double(top) - double(block_top)) * rows.inv_temperature;
      weighted = std::exp(drop) * (weighted + drop * sum);
      sum *= std::exp(drop);
      top = block_top;
    }
    if (with_entropy) {
      const ExpMoments moments = exp_moments(block, finite_shift(top), rows.inv_temperature, n);
      sum += moments.sum;
      weighted += moments.weighted;
    } else {
      sum += exp_sum(block, finite_shift(top), rows.inv_temperature, n);
    }
  }
  Stats stats;
  stats.top = top;
  stats.log_sum = float(std::log(sum));
  if (sum != 0.0) stats.rest_entropy = float(std::log(sum) - weighted / sum);
  stats.target = target.column < 0 ? kNegInf : element(row, target.column);
  return stats;
}

// Overwrites a row after one read. exp((x - largest of its block) / temperature) is stored in `exps` and then
// scaled into the row. `finish(stats)` returns the factor of the rest's softmax and the value at the target.
template <typename T, typename Finish>
void overwrite_row(T* row, Target target, const RowArguments& rows, std::vector<float>& scratch, const Finish& finish) {
  float block[kBlock];
  const int64_t num_blocks = (rows.num_columns + kBlock - 1) / kBlock;
  scratch.resize(rows.num_columns + 2 * num_blocks);
  float *exps = scratch.data(), *tops = exps + rows.num_columns, *sums = tops + num_blocks;
  Stats stats;
  stats.target = target.column < 0 ? kNegInf : element(row, target.column);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = b * kBlock;
    const int n = int(std::min<int64_t>(kBlock, rows.num_columns - begin));
    load_rest(row, begin, n, target.column, block);
    tops[b] = largest(block, n);
    sums[b] = exp_store(block, finite_shift(tops[b]), rows.inv_temperature, exps + begin, n);
    stats.top = std::max(stats.top, tops[b]);
  }
  const auto factor = [&](int64_t b) {
    return tops[b] == kNegInf ? 1.0 : std::exp((double(tops[b]) - double(stats.top)) * rows.inv_temperature);
  };
  double sum = 0.0;
  for (int64_t b = 0; b < num_blocks; ++b) sum += double(sums[b]) * factor(b);
  stats.log_sum = float(std::log(sum));
  const auto [rest_scale, target_value] = finish(stats);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = b * kBlock;
    const int n = int(std::min<int64_t>(kBlock, rows.num_columns - begin));
    store(exps + begin, float(rest_scale * (sum == 0.0 ? 0.0 : factor(b) / sum)), row + begin, n);
  }
  if (target.column >= 0) store(&target_value, 1.0f, row + target.column, 1);
  std::fill(row + rows.num_columns, row + rows.row_columns, T{});
}

struct Finished {
  double rest_scale;
  float target_value;
};

template <typename F>
void over_rows(const RowArguments& rows, const F& row_range) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.num_columns));
  torch::stable::parallel_for(0, rows.num_rows, grain, row_range);
}

template <typename T>
void stats_rows(const RowArguments& rows, float* stats, int num_stats, float* log_probs) {
  over_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Target target(rows.targets[r], rows);
      const bool with_entropy = num_stats > kNumStats;
      const Stats s = target.ignored ? Stats{} : reduce_row(rows.row<T>(r), target, rows, with_entropy);
      float* out = stats + r * num_stats;
      out[kTop] = s.top;
      out[kLogSum] = s.log_sum;
      out[kTarget] = s.target;
      if (with_entropy) out[kRestEntropy] = s.rest_entropy;
      if (log_probs != nullptr) log_probs[r] = target.ignored ? 0.0f : log_prob_of(gap_of(s, rows.inv_temperature));
    }
  });
}

template <typename T>
void dlogits_rows(const RowArguments& rows, const float* grad_stats, const float* stats, int num_stats, T* out, int64_t out_stride) {
  over_rows(rows, [&](int64_t begin, int64_t end) {
    float block[kBlock];
    for (int64_t r = begin; r < end; ++r) {
      T* to = out + r * out_stride;
      const Target target(rows.targets[r], rows);
      const float *g = grad_stats + r * num_stats, *s = stats + r * num_stats;
      const bool with_entropy = num_stats > kNumStats, empty = s[kLogSum] == kNegInf;
      const RestGradient rest{
          finite_shift(s[kTop]), rows.inv_temperature, s[kLogSum], g[kLogSum], with_entropy ? g[kRestEntropy] : 0.0f,
          with_entropy ? s[kRestEntropy] : 0.0f};
      for (int64_t at = 0; at < rows.num_columns; at += kBlock) {
        const int n = int(std::min<int64_t>(kBlock, rows.num_columns - at));
        if (target.ignored) {
          std::fill_n(to + at, n, T{});
          continue;
        }
        if (empty) {  // q is 0; a NaN gradient stays one
          std::fill_n(block, n, g[kLogSum] * 0.0f);
          store(block, 1.0f, to + at, n);
          continue;
        }
        load(rows.row<T>(r) + at, block, n);
        rest_gradient(block, rest, block, n);
        store(block, rows.inv_temperature, to + at, n);
      }
      if (!target.ignored && target.column >= 0) store(g + kTarget, 1.0f, to + target.column, 1);
      std::fill(to + rows.num_columns, to + rows.row_columns, T{});
    }
  });
}

template <typename T>
void rest_softmax_rows(const RowArguments& rows, float* stats) {
  over_rows(rows, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t r = begin; r < end; ++r) {
      const Target target(rows.targets[r], rows);
      Stats seen;
      if (target.ignored) {
        std::fill_n(rows.row<T>(r), rows.row_columns, T{});
      } else {
        overwrite_row(rows.row<T>(r), target, rows, scratch, [&](const Stats& s) {
          seen = s;
          return Finished{1.0, -1.0f};
        });
      }
      float* out = stats + r * kNumStats;
      out[kTop] = seen.top;
      out[kLogSum] = seen.log_sum;
      out[kTarget] = seen.target;
    }
  });
}

template <typename T>
void weighted_rows(const RowArguments& rows, const float* weights, float* log_probs) {
  over_rows(rows, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t r = begin; r < end; ++r) {
      const Target target(rows.targets[r], rows);
      log_probs[r] = 0.0f;
      if (target.ignored) {
        std::fill_n(rows.row<T>(r), rows.row_columns, T{});
        continue;
      }
      overwrite_row(rows.row<T>(r), target, rows, scratch, [&](const Stats& s) {
        const double gap = gap_of(s, rows.inv_temperature), tail = std::exp(-std::abs(gap));
        log_probs[r] = log_prob_of(gap);
        const double slope = weights[r] * (gap >= 0.0 ? 1.0 : tail) / (1.0 + tail) * rows.inv_temperature;
        return Finished{-slope, float(slope)};
      });
    }
  });
}

// Calls `run` with a null pointer of the logits' element type.
template <typename F>
void with_element(const RowArguments& rows, const F& run) {
  switch (rows.dtype) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<BFloat16*>(nullptr));
    default: return run(static_cast<Float16*>(nullptr));
  }
}

// An empty `log_probs` means that log p is not requested.
void log_prob_stats(
    Tensor logits, Tensor targets, Tensor stats, Tensor log_probs, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  const int num_stats = check_num_stats(stats);
  float* out = check_floats(stats, "stats", rows.num_rows, num_stats, logits);
  float* scored = log_probs.numel() == 0 ? nullptr : check_floats(log_probs, "log_probs", rows.num_rows, 1, logits);
  with_element(rows, [&]<typename T>(T*) { stats_rows<T>(rows, out, num_stats, scored); });
}

void dlogits(
    Tensor grad_stats, Tensor stats, Tensor logits, Tensor targets, Tensor out, double inv_temperature, int64_t vocab_start,
    int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  const RowArguments to(out, targets, inv_temperature, vocab_start, num_columns);
  to.check_overwritten("out");
  check_device(out, "out", logits);
  STD_TORCH_CHECK(
      to.dtype == rows.dtype && to.row_columns == rows.row_columns, "out: expected the logits' dtype and ", rows.row_columns,
      " columns, got scalar type ", int(to.dtype), " and ", to.row_columns, " columns");
  const int num_stats = check_num_stats(stats);
  const float* g = check_floats(grad_stats, "grad_stats", rows.num_rows, num_stats, logits);
  const float* s = check_floats(stats, "stats", rows.num_rows, num_stats, logits);
  with_element(rows, [&]<typename T>(T*) { dlogits_rows<T>(rows, g, s, num_stats, to.row<T>(0), to.row_stride); });
}

void rest_softmax_(Tensor logits, Tensor targets, Tensor stats, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  float* out = check_floats(stats, "stats", rows.num_rows, kNumStats, logits);
  with_element(rows, [&]<typename T>(T*) { rest_softmax_rows<T>(rows, out); });
}

void log_prob_dlogits_(
    Tensor logits, Tensor targets, Tensor weights, Tensor log_probs, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  const float* w = check_floats(weights, "weights", rows.num_rows, 1, logits);
  float* out = check_floats(log_probs, "log_probs", rows.num_rows, 1, logits);
  with_element(rows, [&]<typename T>(T*) { weighted_rows<T>(rows, w, out); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CPU, m) {
  m.impl("log_prob_stats", TORCH_BOX(&log_prob_stats));
  m.impl("dlogits", TORCH_BOX(&dlogits));
  m.impl("rest_softmax_", TORCH_BOX(&rest_softmax_));
  m.impl("log_prob_dlogits_", TORCH_BOX(&log_prob_dlogits_));
}

}  // namespace rlsc::cpu
