// Overwrites rows with one read and one write of device memory (Hopper and later).
//
// A row is spread over the blocks of a cluster; each holds its slice in shared memory. Blocks are persistent and work on a
// ring of slices: while one is reduced and overwritten, the copy engine loads the next ones and stores the last one. Per row,
// the blocks exchange 16 bytes through distributed shared memory. The order of every sum is fixed.
#pragma once

#include "common.cuh"
#include "hopper.cuh"

namespace rlsc::cuda {

constexpr int kClusterThreads = 384;
constexpr int kMaxCluster = 8;  // what every device of this kind can schedule
constexpr int kMaxStages = 4;

struct ClusterLayout {
  int cluster, stages, slice_bytes;  // slice_bytes: a multiple of 16
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// This block's part of every row, in vectors of 16 bytes; the last block also has the columns that fill no vector.
struct Slice {
  int first, vectors;            // first column, full vectors
  int tail_first, tail_columns;  // columns beyond the row's last full vector: 0 except in the last block

  template <typename T>
  __device__ static Slice of(const Rows& rows, int slice_bytes) {
    constexpr int kSize = Vector<T>::kSize;
    const int rank = int(hopper::cluster_rank()), columns = slice_bytes / int(sizeof(T)), full = rows.num_columns / kSize;
    const int begin = min(rank * (columns / kSize), full), end = min(begin + columns / kSize, full);
    const bool is_last = rank == int(hopper::cluster_size()) - 1;
    return {begin * kSize, end - begin, full * kSize, is_last ? rows.num_columns - full * kSize : 0};
  }
};

// Starts the copy of a row's slice; `id` is the row's target: ignored rows are not read.
template <typename T>
__device__ __forceinline__ void issue_load(const Rows& rows, int64_t row, int64_t id, const Slice& slice, void* buffer, uint64_t* barrier) {
  const uint32_t bytes = id < 0 ? 0 : uint32_t(slice.vectors) * 16;
  hopper::barrier_arrive_expecting(barrier, bytes);
  if (bytes) hopper::bulk_load(buffer, static_cast<const T*>(rows.logits) + row * rows.row_stride + slice.first, bytes, barrier);
}

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kClusterThreads) cluster_rows(const Rows rows, const int stages, const int slice_bytes) {
  constexpr int kSize = Vector<T>::kSize, kWarps = kClusterThreads / kWarp;
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ uint64_t loaded[kMaxStages];
  __shared__ Mass warps[2][kWarps];
  __shared__ float4 peers[2][kMaxCluster];  // (top, sum, target's logit, whether it is there), for even and odd rows
  const int tid = threadIdx.x, cluster = int(hopper::cluster_size()), rank = int(hopper::cluster_rank());
  const Slice slice = Slice::of<T>(rows, slice_bytes);
  const int64_t first_row = blockIdx.x / cluster, step = gridDim.x / cluster;

  if (tid == 0) {
    for (int s = 0; s < stages; ++s) hopper::barrier_init(&loaded[s]);
    hopper::fence_barrier_init();
    for (int s = 0; s + 1 < stages; ++s) {
      const int64_t row = first_row + s * step;
      if (row < rows.num_rows) issue_load<T>(rows, row, rows.targets[row], slice, buffers + s * slice_bytes, &loaded[s]);
    }
  }
  __syncthreads();
  if (cluster > 1) hopper::cluster_sync();  // every peer runs: its shared memory may be written

  // Targets are read one row early: nothing waits for them.
  const auto target_id = [&](int64_t row) { return row < rows.num_rows ? rows.targets[row] : int64_t(-1); };
  int64_t next_id = target_id(first_row), next_ahead_id = target_id(first_row + (stages - 1) * step);
  const float scale = rows.inv_temperature * kLog2e;
  int stage = 0, parity = 0, turn = 0;
  for (int64_t row = first_row; row < rows.num_rows; row += step) {
    T* x = static_cast<T*>(rows.logits) + row * rows.row_stride;
    uint4* held = reinterpret_cast<uint4*>(buffers + stage * slice_bytes);
    const int64_t id = next_id, ahead = row + (stages - 1) * step, ahead_id = next_ahead_id;
    next_id = target_id(row + step);
    next_ahead_id = target_id(ahead + step);
    const float weight = kWeighted ? rows.weights[row] : 0.0f;
    const bool ignored = id < 0;
    const int column = ignored ? -1 : target_column(rows, id);
    const int local = column - slice.first, in_slice = column >= slice.first && local < slice.vectors * kSize ? local : -1;
    const int target_vector = in_slice < 0 ? -1 : in_slice / kSize, target_element = in_slice % kSize;
    const int tail_column = tid < slice.tail_columns ? slice.tail_first + tid : -1;

    hopper::barrier_wait(&loaded[stage], parity);

    // Reduce: sums of exponentials without the target.
    Mass mass = Mass::none();
    float tail = negative_infinity();
    if (!ignored) {
      for (int i = tid; i < slice.vectors; i += kClusterThreads) {
        float v[kSize];
        Vector<T>::unpack(held[i], v);
        if (i == target_vector) Vector<T>::set(v, target_element, negative_infinity());
        mass.add(v, scale);
      }
      if (tail_column >= 0) {
        tail = to_float(x[tail_column]);
        const float rest[1] = {tail_column == column ? negative_infinity() : tail};
        mass.add(rest, scale);
      }
    }

    // The last row's store has had this long to read its buffer; the row after the ones in flight goes there.
    if (tid == 0 && ahead < rows.num_rows) {
      const int free = stage == 0 ? stages - 1 : stage - 1;
      hopper::wait_stores_read();
      issue_load<T>(rows, ahead, ahead_id, slice, buffers + free * slice_bytes, &loaded[free]);
    }

    float target = negative_infinity();
    Finish finish{};
    if (!ignored) {
      // Join over the block, then over the cluster. Even and odd rows alternate, so that one barrier per row is enough.
      mass = warp_join(mass);
      if (tid % kWarp == 0) warps[turn][tid / kWarp] = mass;
      __syncthreads();
      mass = warp_join(tid % kWarp < kWarps ? warps[turn][tid % kWarp] : Mass::none());
      const bool here = in_slice >= 0 || (column >= slice.tail_first && slice.tail_columns > 0);
      if (here) target = to_float(in_slice >= 0 ? reinterpret_cast<const T*>(held)[in_slice] : x[column]);
      if (cluster > 1) {
        if (tid < cluster) hopper::store_to_peer(&peers[turn][rank], tid, make_float4(mass.top, mass.sum, target, here ? 1.0f : 0.0f));
        hopper::cluster_sync();
        mass = Mass::none();
        for (int peer = 0; peer < cluster; ++peer) {
          const float4 seen = peers[turn][peer];
          mass = mass.join({seen.x, seen.y});
          if (seen.w != 0.0f) target = seen.z;
        }
      }
      turn ^= 1;
      finish = finish_row<kWeighted>(mass, target, weight, rows.inv_temperature, scale);
      if (cluster == 1) __syncthreads();  // the target's logit has been read by everyone
    }

    // Overwrite the slice and hand it to the copy engine.
    for (int i = tid; i < slice.vectors; i += kClusterThreads) {
      if (ignored) {
        held[i] = make_uint4(0, 0, 0, 0);
        continue;
      }
      float v[kSize];
      Vector<T>::unpack(held[i], v);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] = finish.rest_scale * exp2_fast(fmaf(v[k], scale, -finish.top));
      if (i == target_vector) Vector<T>::set(v, target_element, finish.target_value);
      held[i] = Vector<T>::pack(v);
    }
    if (tail_column >= 0) {
      const float q = ignored ? 0.0f : finish.rest_scale * exp2_fast(fmaf(tail, scale, -finish.top));
      store_float(x + tail_column, tail_column == column ? finish.target_value : q);
    }
    if (rank == 0) {
      for (int i = rows.num_columns + tid; i < rows.row_columns; i += kClusterThreads) store_float(x + i, 0.0f);
    }
    hopper::fence_before_bulk_store();
    __syncthreads();
    if (tid == 0) {
      if (slice.vectors > 0) hopper::bulk_store(x + slice.first, held, uint32_t(slice.vectors) * 16);
      if (rank == 0 && ignored) write_ignored<kWeighted>(rows, row);
      if (rank == 0 && !ignored) write_outputs<kWeighted>(rows, row, finish);
    }
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  if (tid == 0) hopper::wait_stores();
}

#else
template <typename T, bool kWeighted>
__global__ void cluster_rows(const Rows, const int, const int) {}  // never launched below sm_90
#endif

}  // namespace rlsc::cuda
