// Runs the cluster kernel on simulated blocks and compares every element with float64.
#include "kernel.h"  // csrc/cuda/common.cuh and rows_cluster.cuh, prepared by test_cluster_simulation.py

using namespace rlsc::cuda;

constexpr int kThreads = 64;

struct Case {
  int cluster, stages, rows_per_cluster, num_rows, num_columns, row_columns, vocab_start;
  float inv_temperature;
};

// Runs one cluster after the other: no cluster waits for another one. They are kept, because messages may still be under way.
template <typename T, typename Out, bool kWeighted>
void launch(const Rows& rows, const Case& c) {
  static std::vector<std::unique_ptr<device::Cluster>> clusters;
  const int vectors = c.num_columns / Vector<T>::kSize, slice_bytes = std::max((vectors + c.cluster - 1) / c.cluster, 1) * 16;
  const ClusterLayout layout{c.cluster, kThreads, c.stages, c.rows_per_cluster, slice_bytes};
  const int num_clusters = (c.num_rows + c.rows_per_cluster - 1) / c.rows_per_cluster;
  for (int i = num_clusters - 1; i >= 0; --i) {
    device::Cluster& cluster = *clusters.emplace_back(std::make_unique<device::Cluster>(c.cluster * kThreads));
    for (int rank = 0; rank < c.cluster; ++rank) {
      const size_t bytes = size_t(c.stages) * slice_bytes;
      cluster.blocks.push_back(std::make_unique<device::Block>(cluster, rank, i * c.cluster + rank, kThreads, bytes));
    }
    std::vector<std::thread> threads;
    for (const auto& block : cluster.blocks) {
      for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&rows, &layout, t, here = block.get()] {
          device::block = here;
          device::thread = t;
          cluster_rows<T, Out, kWeighted, kThreads>(rows, layout);
          --here->running;
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
  }
}

bool close(double got, double expected, double relative) {
  return got == expected || std::abs(got - expected) <= relative * std::abs(expected) + 1e-7;
}

template <typename T>
const char* name_of() {
  if (sizeof(T) == 4) return "float32";
  return std::is_same_v<T, __half> ? "float16" : "bfloat16";
}

// Row r of a case is special by r % 6: its target is the last column, the first, any, on no rank here, or the row is ignored. The
// last row is always ignored; with `spoiled` row 2 has a NaN.
template <typename T, bool kWeighted, typename Out = T>
int run(const Case& c, bool spoiled = false) {
  std::mt19937 random(c.num_rows * 131 + c.num_columns);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const int stride = c.row_columns;
  std::vector<uint4> storage(size_t(c.num_rows) * stride * sizeof(T) / 16 + 1), other(size_t(c.num_rows) * stride * sizeof(Out) / 16 + 1);
  T* logits = reinterpret_cast<T*>(storage.data());
  Out* written = std::is_same_v<T, Out> ? reinterpret_cast<Out*>(logits) : reinterpret_cast<Out*>(other.data());
  std::vector<int64_t> targets(c.num_rows);
  std::vector<float> weights(c.num_rows), out(3 * c.num_rows, 99.0f);
  std::vector<std::vector<double>> x(c.num_rows, std::vector<double>(c.num_columns));
  for (int r = 0; r < c.num_rows; ++r) {
    for (int j = 0; j < stride; ++j) store_float(logits + size_t(r) * stride + j, j < c.num_columns ? normal(random) : NAN);
    const int special[] = {c.num_columns - 1, 0, int(random() % c.num_columns), -1, c.num_columns + 5, c.num_columns / 2};
    const int column = r == c.num_rows - 1 ? -1 : special[r % 6];
    if (spoiled && r == 2) store_float(logits + size_t(r) * stride + (column + 1) % c.num_columns, NAN);
    for (int j = 0; j < c.num_columns; ++j) x[r][j] = double(to_float(logits[size_t(r) * stride + j])) * c.inv_temperature;
    targets[r] = column == -1 ? -100 : c.vocab_start + column;
    weights[r] = normal(random);
  }
  launch<T, Out, kWeighted>({logits, written, targets.data(), weights.data(), out.data(), c.num_rows, stride, stride, c.vocab_start,
                             c.num_columns, stride, c.inv_temperature}, c);
  int wrong = 0;
  const auto expect = [&](int row, const char* what, int column, double got, double expected, double relative, double floor = 1e-7) {
    const bool equal = got == expected || std::abs(got - expected) <= relative * std::abs(expected) + floor || (got != got && expected != expected);
    if (!equal && wrong++ < 3) std::printf("row %d %s %d: got %g, expected %g\n", row, what, column, got, expected);
  };
  for (int r = 0; r < c.num_rows; ++r) {
    const bool ignored = targets[r] < 0;
    const int64_t column = ignored ? -1 : targets[r] - c.vocab_start;
    const bool owned = column >= 0 && column < c.num_columns;
    double top = -INFINITY, sum = 0.0;
    for (int j = 0; j < c.num_columns; ++j) top = j == column ? top : std::fmax(top, x[r][j]);
    for (int j = 0; j < c.num_columns; ++j) sum += j == column ? 0.0 : std::exp(x[r][j] - top);
    const double lse = top + std::log(sum), target = owned ? x[r][column] : -INFINITY, gap = lse - target;
    const double q = owned ? 1.0 / (1.0 + std::exp(-gap)) : 1.0, slope = weights[r] * q * c.inv_temperature;
    const double relative = sizeof(Out) == 4 ? 3e-5 : 5e-3, floor = std::is_same_v<Out, __half> ? 3e-7 : 1e-7;
    for (int j = 0; j < stride; ++j) {
      double expected = j < c.num_columns ? (kWeighted ? -slope : 1.0) * std::exp(x[r][j] - lse) : 0.0;
      if (owned && j == column) expected = kWeighted ? slope : -1.0;
      expect(r, "column", j, to_float(written[size_t(r) * stride + j]), ignored ? 0.0 : expected, relative, floor);
    }
    if (kWeighted) {
      const double log_p = gap != gap ? gap : -(std::max(gap, 0.0) + std::log1p(std::exp(-std::abs(gap))));
      expect(r, "log p", 0, out[r], ignored ? 0.0 : log_p, 1e-5);
    } else {
      const double got = double(out[3 * r]) * c.inv_temperature + out[3 * r + 1];
      expect(r, "rest_lse", 0, got, ignored ? -INFINITY : lse, 1e-5);
      expect(r, "target", 0, out[3 * r + 2], ignored ? 0.0 : target / c.inv_temperature, 1e-5);
    }
  }
  std::printf("%s to %s %s cluster of %d, %d stages, %d rows each, %d rows of %d%s: %s\n", name_of<T>(), name_of<Out>(),
              kWeighted ? "weighted" : "rest", c.cluster, c.stages, c.rows_per_cluster, c.num_rows, c.num_columns,
              spoiled ? " with a NaN" : "", wrong ? "WRONG" : "ok");
  return wrong;
}

int main() {
  using bfloat16 = __nv_bfloat16;
  int wrong = 0;
  // cluster, stages, rows of a cluster, rows, columns, columns with padding, first column's id, 1 / temperature
  wrong += run<float, true>({1, 1, 1, 4, 96, 96, 0, 1.0f});
  wrong += run<float, true>({1, 2, 8, 13, 2051, 2056, 0, 1.0f});  // a ring of two, more rows than it holds, a short last cluster
  wrong += run<float, false>({1, 1, 3, 11, 1001, 1004, 500, 1.3f});
  wrong += run<float, true>({2, 1, 1, 7, 1003, 1004, 0, 0.7f});
  wrong += run<bfloat16, false>({4, 1, 1, 7, 9001, 9008, 40, 1.0f});  // the layout of a large vocabulary
  wrong += run<bfloat16, true>({4, 1, 1, 7, 9001, 9008, 40, 1.0f});
  wrong += run<bfloat16, true>({2, 2, 5, 13, 777, 784, 0, 2.0f});
  wrong += run<bfloat16, false>({8, 2, 7, 8, 4100, 4104, 0, 1.0f});
  wrong += run<__half, true>({8, 1, 1, 3, 4100, 4104, 7, 1.0f});
  wrong += run<__half, false>({1, 2, 4, 7, 1501, 1504, 7, 0.8f});
  wrong += run<float, false>({4, 1, 3, 7, 7, 8, 0, 1.0f});       // one vector and a tail: most blocks hold nothing
  wrong += run<bfloat16, false>({2, 2, 4, 6, 3, 8, 0, 1.0f});    // no vector at all
  wrong += run<bfloat16, true>({4, 1, 2, 5, 2051, 2056, 0, 1.0f}, true);
  wrong += run<float, false>({1, 2, 5, 5, 301, 304, 0, 1.0f}, true);
  wrong += run<float, false, bfloat16>({2, 2, 3, 7, 1003, 1008, 0, 0.9f});  // float32 logits, their softmax in another type
  wrong += run<float, false, __half>({4, 1, 1, 4, 2001, 2008, 11, 1.0f});
  return wrong == 0 ? 0 : 1;
}
