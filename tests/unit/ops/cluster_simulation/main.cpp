// Runs the cluster kernel on simulated blocks and compares every element with float64.
#include "kernel.h"  // csrc/cuda/common.cuh and rows_cluster.cuh, prepared by test_cluster_simulation.py

using namespace rlsc::cuda;

struct Case {
  int cluster, num_clusters, stages, num_rows, num_columns, row_columns, vocab_start;
  float inv_temperature;
};

template <typename T, bool kWeighted>
void launch(const Rows& rows, const Case& c) {
  const int vectors = c.num_columns / Vector<T>::kSize, slice_bytes = std::max((vectors + c.cluster - 1) / c.cluster, 1) * 16;
  device::grid = int64_t(c.cluster) * c.num_clusters;
  std::vector<std::unique_ptr<device::Cluster>> clusters;
  std::vector<std::thread> threads;
  for (int i = 0; i < c.num_clusters; ++i) {
    device::Cluster& cluster = *clusters.emplace_back(std::make_unique<device::Cluster>(c.cluster * kClusterThreads));
    for (int rank = 0; rank < c.cluster; ++rank) {
      const size_t bytes = size_t(c.stages) * slice_bytes;
      cluster.blocks.push_back(std::make_unique<device::Block>(cluster, rank, i * c.cluster + rank, kClusterThreads, bytes));
    }
  }
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      for (int t = 0; t < kClusterThreads; ++t) {
        threads.emplace_back([&rows, &c, slice_bytes, t, here = block.get()] {
          device::block = here;
          device::thread = t;
          cluster_rows<T, kWeighted>(rows, c.stages, slice_bytes);
        });
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
}

bool close(double got, double expected, double relative) {
  return got == expected || std::abs(got - expected) <= relative * std::abs(expected) + 1e-7;
}

template <typename T, bool kWeighted>
int run(const Case& c) {
  std::mt19937 random(c.num_rows * 131 + c.num_columns);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const int stride = c.row_columns;
  std::vector<uint4> storage(size_t(c.num_rows) * stride * sizeof(T) / 16 + 1);
  T* logits = reinterpret_cast<T*>(storage.data());
  std::vector<int64_t> targets(c.num_rows);
  std::vector<float> weights(c.num_rows), out(3 * c.num_rows, 99.0f);
  std::vector<std::vector<double>> x(c.num_rows, std::vector<double>(c.num_columns));
  for (int r = 0; r < c.num_rows; ++r) {
    for (int j = 0; j < stride; ++j) store_float(logits + size_t(r) * stride + j, j < c.num_columns ? normal(random) : NAN);
    for (int j = 0; j < c.num_columns; ++j) x[r][j] = double(to_float(logits[size_t(r) * stride + j]) * c.inv_temperature);
    const int special[] = {c.num_columns - 1, 0, int(random() % c.num_columns), -1, c.num_columns + 5};  // -1: ignored; last: not here
    const int column = special[r % 5];
    targets[r] = column == -1 ? -100 : c.vocab_start + column;
    weights[r] = normal(random);
  }
  launch<T, kWeighted>({logits, targets.data(), weights.data(), out.data(), c.num_rows, stride, c.vocab_start, c.num_columns, stride,
                        c.inv_temperature}, c);
  int wrong = 0;
  const auto expect = [&](int row, const char* what, int column, double got, double expected, double relative) {
    if (!close(got, expected, relative) && wrong++ < 3) std::printf("row %d %s %d: got %g, expected %g\n", row, what, column, got, expected);
  };
  for (int r = 0; r < c.num_rows; ++r) {
    const bool ignored = targets[r] < 0;
    const int64_t column = ignored ? -1 : targets[r] - c.vocab_start;
    const bool owned = column >= 0 && column < c.num_columns;
    double top = -INFINITY, sum = 0.0;
    for (int j = 0; j < c.num_columns; ++j) top = j == column ? top : std::max(top, x[r][j]);
    for (int j = 0; j < c.num_columns; ++j) sum += j == column ? 0.0 : std::exp(x[r][j] - top);
    const double lse = top + std::log(sum), target = owned ? x[r][column] : -INFINITY, gap = lse - target;
    const double q = owned ? 1.0 / (1.0 + std::exp(-gap)) : 1.0, slope = weights[r] * q * c.inv_temperature;
    for (int j = 0; j < stride; ++j) {
      double expected = (kWeighted ? -slope : 1.0) * (j < c.num_columns ? std::exp(x[r][j] - lse) : 0.0);
      if (owned && j == column) expected = kWeighted ? slope : -1.0;
      expect(r, "column", j, to_float(logits[size_t(r) * stride + j]), ignored ? 0.0 : expected, sizeof(T) == 4 ? 3e-5 : 5e-3);
    }
    if (kWeighted) {
      expect(r, "log p", 0, out[r], ignored ? 0.0 : -(std::max(gap, 0.0) + std::log1p(std::exp(-std::abs(gap)))), 1e-5);
    } else {
      const double got = double(out[3 * r]) * c.inv_temperature + out[3 * r + 1];
      expect(r, "rest_lse", 0, got, ignored ? -INFINITY : lse, 1e-5);
      expect(r, "target", 0, out[3 * r + 2], ignored ? 0.0 : target / c.inv_temperature, 1e-5);
    }
  }
  std::printf("%s %s cluster %d x %d, %d stages, %d rows of %d: %s\n", sizeof(T) == 4 ? "float32" : "bfloat16",
              kWeighted ? "weighted" : "rest", c.cluster, c.num_clusters, c.stages, c.num_rows, c.num_columns, wrong ? "WRONG" : "ok");
  return wrong;
}

int main() {
  int wrong = 0;
  wrong += run<float, true>({1, 1, 2, 7, 96, 96, 0, 1.0f});
  wrong += run<float, false>({1, 2, 2, 11, 1001, 1004, 500, 1.3f});
  wrong += run<float, true>({2, 1, 2, 9, 1003, 1004, 0, 0.7f});
  wrong += run<__nv_bfloat16, false>({4, 1, 3, 9, 2051, 2056, 40, 1.0f});
  wrong += run<__nv_bfloat16, true>({2, 2, 3, 13, 777, 784, 0, 2.0f});
  wrong += run<float, false>({4, 1, 4, 9, 7, 8, 0, 1.0f});         // a row of tail and one vector: most blocks hold nothing
  wrong += run<__nv_bfloat16, false>({2, 1, 2, 6, 3, 8, 0, 1.0f});  // no vector at all
  return wrong == 0 ? 0 : 1;
}
