// Overwrite rows with one read and one write of device memory (Hopper and later).
//
// A row is split over the blocks of a cluster. Each block loads its slice into shared memory with kParts bulk
// copies, each with its own barrier. It reduces a part as soon as the copy is complete, and writes the result
// from registers to device memory. The blocks exchange 16 bytes per row with asynchronous stores that are
// counted by a barrier of the receiver. A cluster processes `rows_per_cluster` rows. With two stages, the next
// row's copies run while one row is reduced. The hardware schedules the clusters, so the number of resident
// clusters does not matter. The order of every sum is fixed.
#pragma once

#include "common.cuh"
#include "hopper.cuh"

namespace rlsc::cuda {

constexpr int kMaxCluster = 8;  // what every device of this kind can schedule
constexpr int kMaxStages = 2;
constexpr int kParts = 4;

struct ClusterLayout {
  int cluster, threads, stages, rows_per_cluster;
  int slice_bytes;  // of one block's part of a row: a multiple of 16
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// This block's part of every row, in vectors of 16 bytes. The last block also has the remaining columns that
// do not fill a vector.
struct Slice {
  int first, vectors, part_vectors;  // first column, full vectors, vectors of one bulk copy
  int tail_first, tail_columns;      // columns beyond the row's last full vector: none except in the last block

  template <typename T>
  __device__ static Slice of(const Rows& rows, const ClusterLayout& layout, int rank) {
    constexpr int kSize = Vector<T>::kSize;
    const int most = layout.slice_bytes / 16, full = rows.num_columns / kSize;
    const int begin = min(rank * most, full), end = min(begin + most, full);
    const bool is_last = rank == layout.cluster - 1;
    // A part is a whole number of rounds of all threads, so that no extra round runs with idle threads.
    const int rounds = (end - begin + layout.threads - 1) / layout.threads;
    const int part_vectors = (rounds + kParts - 1) / kParts * layout.threads;
    return {begin * kSize, end - begin, part_vectors, full * kSize, is_last ? rows.num_columns - full * kSize : 0};
  }

  __device__ __forceinline__ int part_begin(int part) const { return min(part * part_vectors, vectors); }
};

// Starts the copies of a row's slice; ignored rows (`id` < 0) are not read.
template <typename T>
__device__ __forceinline__ void issue_loads(const Rows& rows, int64_t row, int64_t id, const Slice& slice, void* buffer, uint64_t* barriers) {
  const T* from = static_cast<const T*>(rows.logits) + row * rows.row_stride + slice.first;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int begin = slice.part_begin(part), vectors = id < 0 ? 0 : slice.part_begin(part + 1) - begin;
    hopper::barrier_arrive_expecting(&barriers[part], uint32_t(vectors) * 16);
    if (vectors) {
      hopper::bulk_load(static_cast<uint4*>(buffer) + begin, from + begin * Vector<T>::kSize, uint32_t(vectors) * 16, &barriers[part]);
    }
  }
}

// The values at one place of a row: a vector in shared memory, or the last columns in device memory. Columns
// outside this rank's range and the target (`element` of this vector, or negative for none) are set to -inf.
template <typename T>
struct Piece {
  static constexpr int kSize = Vector<T>::kSize;
  float x[kSize];
  float target;

  __device__ __forceinline__ Piece(uint4 raw, int columns, int element) {
    Vector<T>::unpack(raw, x);
    target = negative_infinity();
    if (element >= 0) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) target = k == element ? x[k] : target;
      Vector<T>::set(x, element, negative_infinity());
    }
    if (columns < kSize) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) x[k] = k < columns ? x[k] : negative_infinity();
    }
  }

  __device__ __forceinline__ void finish(const Finish& row, float scale, int element) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = row.rest_scale * exp2_fast(fmaf(x[k], scale, -row.top));
    if (element >= 0) Vector<T>::set(x, element, row.target_value);
  }
};

// Combines the blocks' masses and the target's logit, which one block holds; `count` is the number of
// combined rows.
struct Exchange {
  float4* peers;      // [2][kMaxCluster] (top, sum, target's logit, whether it is there), for even and odd rows
  uint64_t* arrived;  // [2]
  int count = 0;

  // Two buffers are enough: a peer sends a row's mass only after this block has sent the mass of the previous
  // row. By then this block has read the values of the row before that (there is a block barrier in between).
  __device__ __forceinline__ void join(int tid, int rank, int cluster, bool has_target, Mass& mass, float& target) {
    const int buffer = count & 1, parity = (count >> 1) & 1;
    float4* slots = peers + buffer * kMaxCluster;
    if (tid == 0) hopper::barrier_arrive_expecting(&arrived[buffer], uint32_t(cluster) * sizeof(float4));
    if (tid < cluster) {
      const float4 mine = make_float4(mass.top, mass.sum, target, has_target ? 1.0f : 0.0f);
      hopper::store_to_peer(&slots[rank], uint32_t(tid), mine, &arrived[buffer]);
    }
    hopper::barrier_wait(&arrived[buffer], parity);
    mass = Mass::none();
    for (int peer = 0; peer < cluster; ++peer) {
      const float4 seen = slots[peer];
      mass = mass.join({seen.x, seen.y});
      if (seen.w != 0.0f) target = seen.z;
    }
    ++count;
  }
};

// Logits have type T. The values that overwrite them have type Out and go to rows.written (the logits
// themselves if Out is T).
template <typename T, typename Out, bool kWeighted, int kThreads>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads) cluster_rows(const Rows rows, const ClusterLayout layout) {
  constexpr int kSize = Vector<T>::kSize, kWarps = kThreads / kWarp;
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ uint64_t loaded[kMaxStages * kParts];
  __shared__ uint64_t arrived[2];
  __shared__ float4 peers[2 * kMaxCluster];
  __shared__ Mass warps[kWarps];
  __shared__ float found_target;
  const int tid = threadIdx.x, cluster = layout.cluster, rank = cluster > 1 ? int(hopper::cluster_rank()) : 0;
  const Slice slice = Slice::of<T>(rows, layout, rank);
  const int64_t first_row = int64_t(blockIdx.x / cluster) * layout.rows_per_cluster;
  const int num_rows = int(min(int64_t(layout.rows_per_cluster), rows.num_rows - first_row));
  const auto buffer_of = [&](int stage) { return reinterpret_cast<uint4*>(buffers + stage * layout.slice_bytes); };

  if (tid == 0) {
    for (int i = 0; i < layout.stages * kParts; ++i) hopper::barrier_init(&loaded[i]);
    hopper::barrier_init(&arrived[0]);
    hopper::barrier_init(&arrived[1]);
    hopper::fence_barrier_init();
    for (int s = 0; s < min(layout.stages, num_rows); ++s) {
      issue_loads<T>(rows, first_row + s, rows.targets[first_row + s], slice, buffer_of(s), &loaded[s * kParts]);
    }
  }
  if (cluster > 1) hopper::cluster_arrive();
  __syncthreads();
  if (cluster > 1) hopper::cluster_wait();  // every peer's barriers are initialised

  const float scale = rows.inv_temperature * kLog2e;
  Exchange exchange{peers, arrived};
  for (int turn = 0; turn < num_rows; ++turn) {
    const int64_t row = first_row + turn, id = rows.targets[row];
    const int stage = turn % layout.stages, parity = turn / layout.stages & 1;
    const T* x = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    Out* written = static_cast<Out*>(rows.written) + row * rows.written_stride;
    const uint4* held = buffer_of(stage);
    const int column = id < 0 ? -1 : target_column(rows, id), local = column - slice.first;
    const bool in_slice = column >= slice.first && local < slice.vectors * kSize;
    const bool in_tail = slice.tail_columns > 0 && column >= slice.tail_first;
    const int target_vector = in_slice ? local / kSize : -1, target_element = local % kSize;
    const bool has_tail = slice.tail_columns > 0 && tid == kThreads - 1;
    const auto tail = [&] {  // the last vector lies within the row's stride, which is a multiple of 16 bytes
      const uint4 raw = *reinterpret_cast<const uint4*>(x + slice.tail_first);
      return Piece<T>(raw, slice.tail_columns, in_tail ? column - slice.tail_first : -1);
    };

    Finish finish{};
    if (id >= 0) {
      // Reduce: sum the exponentials without the target.
      Mass mass = Mass::none();
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        hopper::barrier_wait(&loaded[stage * kParts + part], parity);
        const int end = slice.part_begin(part + 1);
        for (int i = slice.part_begin(part) + tid; i < end; i += kThreads) {
          const Piece<T> piece(held[i], kSize, i == target_vector ? target_element : -1);
          if (i == target_vector) found_target = piece.target;
          mass.add(piece.x, scale);
        }
      }
      if (has_tail) {
        const Piece<T> piece = tail();
        if (in_tail) found_target = piece.target;
        mass.add(piece.x, scale);
      }
      mass = warp_join(mass);
      if (tid % kWarp == 0) warps[tid / kWarp] = mass;
      __syncthreads();
      mass = warp_join(tid % kWarp < kWarps ? warps[tid % kWarp] : Mass::none());
      float target = in_slice || in_tail ? found_target : negative_infinity();
      if (cluster > 1) exchange.join(tid, rank, cluster, in_slice || in_tail, mass, target);
      finish = finish_row<kWeighted>(mass, target, kWeighted ? rows.weights[row] : 0.0f, rows.inv_temperature, scale);
    }

    // Overwrite.
    if (id < 0) {
      for (int i = tid; i < slice.vectors; i += kThreads) store_zeros<kSize>(written + slice.first + i * kSize);
    } else {
#pragma unroll 1
      for (int i = tid; i < slice.vectors; i += kThreads) {
        Piece<T> piece(held[i], kSize, -1);
        piece.finish(finish, scale, i == target_vector ? target_element : -1);
        store_vector(written + slice.first + i * kSize, piece.x);
      }
    }
    if (has_tail) {
      Piece<T> piece = tail();
      piece.finish(finish, scale, in_tail ? column - slice.tail_first : -1);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (k < slice.tail_columns) store_float(written + slice.tail_first + k, id < 0 ? 0.0f : piece.x[k]);
      }
    }
    if (rank == 0) {
      for (int i = rows.num_columns + tid; i < rows.row_columns; i += kThreads) store_float(written + i, 0.0f);
      if (tid == 0 && id < 0) write_ignored<kWeighted>(rows, row);
      if (tid == 0 && id >= 0) write_outputs<kWeighted>(rows, row, finish);
    }
    if (turn + 1 == num_rows) break;
    __syncthreads();  // this row's buffer, `warps` and `found_target` have been read
    const int ahead = turn + layout.stages;
    if (tid == 0 && ahead < num_rows) {
      issue_loads<T>(rows, first_row + ahead, rows.targets[first_row + ahead], slice, buffer_of(stage), &loaded[stage * kParts]);
    }
  }
}

#else
template <typename T, typename Out, bool kWeighted, int kThreads>
__global__ void cluster_rows(const Rows, const ClusterLayout) {}  // never launched below sm_90
#endif

}  // namespace rlsc::cuda
