// Overwrites rows of any length and alignment on any GPU: a block per row, two reads (the second mostly from L2) and one write.
#pragma once

#include "common.cuh"

namespace rlsc::cuda {

constexpr int kStreamingThreads = 512;

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kStreamingThreads) streaming_rows(const Rows rows) {
  const int64_t row = blockIdx.x;
  T* x = static_cast<T*>(rows.logits) + row * rows.row_stride;
  const int64_t id = rows.targets[row];
  if (id < 0) {
    for (int i = threadIdx.x; i < rows.row_columns; i += kStreamingThreads) store_float(x + i, 0.0f);
    if (threadIdx.x == 0) write_ignored<kWeighted>(rows, row);
    return;
  }
  const int column = target_column(rows, id);
  const float target = column < 0 ? negative_infinity() : to_float(x[column]);
  const float scale = rows.inv_temperature * kLog2e;
  Mass mass = Mass::none();
  for (int i = threadIdx.x; i < rows.num_columns; i += kStreamingThreads) {
    const float rest[1] = {i == column ? negative_infinity() : to_float(x[i])};
    mass.add(rest, scale);
  }
  __shared__ Mass warps[kStreamingThreads / kWarp];
  mass = warp_join(mass);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mass;
  __syncthreads();  // also: every thread has read the target before anyone writes
  mass = threadIdx.x % kWarp < kStreamingThreads / kWarp ? warps[threadIdx.x % kWarp] : Mass::none();
  const float weight = kWeighted ? rows.weights[row] : 0.0f;
  const Finish finish = finish_row<kWeighted>(warp_join(mass), target, weight, rows.inv_temperature, scale);
  for (int i = threadIdx.x; i < rows.num_columns; i += kStreamingThreads) {
    const float q = exp2_fast(fmaf(to_float(x[i]), scale, -finish.top));
    store_float(x + i, i == column ? finish.target_value : finish.rest_scale * q);
  }
  for (int i = rows.num_columns + threadIdx.x; i < rows.row_columns; i += kStreamingThreads) store_float(x + i, 0.0f);
  if (threadIdx.x == 0) write_outputs<kWeighted>(rows, row, finish);
}

}  // namespace rlsc::cuda
