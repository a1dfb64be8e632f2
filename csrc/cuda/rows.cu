// Run rest_softmax_ and log_prob_dlogits_ on CUDA: choose the layout of a row over a cluster of blocks, and
// launch.
#include "../row_ops.h"
#include "rows_cluster.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK: torch 2.11 includes it from nowhere else

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace rlsc::cuda {
namespace {

// Maximum bytes of slices per block. Three blocks share the 228 KiB of a multiprocessor; each also needs 1
// KiB for the system and the kernel's own variables. A quarter of 152064 columns in bfloat16 is 76032 bytes.
constexpr int kSliceBudget = 76288;
constexpr int kStaticBytes = 512;
constexpr int kMostRows = 8;  // of one cluster where two slices fit: the start of a cluster is paid once for them

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// RLSC_ROWS_LAYOUT=cluster:threads:stages:rows overrides the layout, to measure other layouts
// (docs/kernels.md).
struct Tuning {
  int cluster = 0, threads = 0, stages = 0, rows = 0;

  static Tuning from_environment() {
    Tuning t;
    const char* value = std::getenv("RLSC_ROWS_LAYOUT");
    if (value == nullptr) return t;
    const int fields = std::sscanf(value, "%d:%d:%d:%d", &t.cluster, &t.threads, &t.stages, &t.rows);
    const bool is_cluster = t.cluster == 1 || t.cluster == 2 || t.cluster == 4 || t.cluster == kMaxCluster;
    STD_TORCH_CHECK(
        fields == 4 && is_cluster && (t.threads == 256 || t.threads == 512) && t.stages >= 1 && t.stages <= kMaxStages && t.rows >= 1,
        "RLSC_ROWS_LAYOUT: expected cluster:threads:stages:rows with a cluster of 1, 2, 4 or 8 blocks, 256 or 512 threads, 1 or 2 "
        "stages and at least 1 row, got ", value);
    return t;
  }
};

int slice_bytes(int row_vectors, int cluster) { return std::max((row_vectors + cluster - 1) / cluster, 1) * 16; }

// Chooses the smallest cluster whose slices allow three blocks per multiprocessor, and two stages if two
// slices fit.
ClusterLayout choose_layout(const Rows& rows, int element_size, int device) {
  static const Tuning tuned = Tuning::from_environment();
  const int row_vectors = rows.num_columns / (16 / element_size);
  ClusterLayout layout{1, 512, 1, 1, 0};
  if (tuned.cluster > 0) {
    layout = {tuned.cluster, tuned.threads, tuned.stages, tuned.rows, 0};
  } else {
    while (layout.cluster < kMaxCluster && slice_bytes(row_vectors, layout.cluster) > kSliceBudget) layout.cluster *= 2;
    layout.stages = 2 * slice_bytes(row_vectors, layout.cluster) <= kSliceBudget ? 2 : 1;
    if (layout.stages > 1) {
      // At least four clusters per place, so that the last clusters to run take a small part of the time.
      const int64_t places = int64_t(device_attribute(cudaDevAttrMultiProcessorCount, device)) * 3 / layout.cluster;
      layout.rows_per_cluster = int(std::clamp<int64_t>(rows.num_rows / (4 * places), 1, kMostRows));
    }
  }
  layout.slice_bytes = slice_bytes(row_vectors, layout.cluster);
  return layout;
}

// Requests the maximum shared memory of a block, once per kernel and device.
template <typename Kernel>
void prepare(Kernel kernel, int device, int largest, std::atomic<uint64_t>& prepared) {
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (prepared.load(std::memory_order_acquire) & bit) return;
  const auto* function = reinterpret_cast<const void*>(kernel);
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, largest));
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  prepared.fetch_or(bit, std::memory_order_release);
}

template <typename T, typename Out, bool kWeighted, int kThreads>
void launch_threads(const Rows& rows, const ClusterLayout& layout, int device) {
  static std::atomic<uint64_t> prepared{0};
  const auto kernel = cluster_rows<T, Out, kWeighted, kThreads>;
  const int largest = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticBytes;
  const int64_t bytes = int64_t(layout.stages) * layout.slice_bytes;
  STD_TORCH_CHECK(
      bytes <= largest, "a row of ", rows.num_columns, " columns takes ", bytes, " bytes of shared memory per block, expected at most ",
      largest, "; use ops.backend=triton");
  prepare(kernel, device, largest, prepared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(layout.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  const int64_t num_clusters = (rows.num_rows + layout.rows_per_cluster - 1) / layout.rows_per_cluster;
  config.gridDim = dim3(unsigned(num_clusters * layout.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = current_stream(device);
  config.attrs = &attribute;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, rows, layout));
}

template <typename T, typename Out, bool kWeighted>
void launch(const Rows& rows, int device) {
  if (rows.num_rows == 0) return;
  const auto aligned = [](const void* at, int64_t stride, size_t size) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride * int64_t(size) % 16 == 0;
  };
  STD_TORCH_CHECK(
      aligned(rows.logits, rows.row_stride, sizeof(T)) && aligned(rows.written, rows.written_stride, sizeof(Out)),
      "logits: expected an address and a row stride that are multiples of 16 bytes; use ops.backend=triton");
  const ClusterLayout layout = choose_layout(rows, sizeof(T), device);
  if (layout.threads == 256) return launch_threads<T, Out, kWeighted, 256>(rows, layout, device);
  launch_threads<T, Out, kWeighted, 512>(rows, layout, device);
}

template <bool kWeighted>
void overwrite_rows(const RowArguments& arguments, const float* weights, float* out, int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Rows rows{
      arguments.logits,      arguments.logits,      arguments.targets,          weights,
      out,                   arguments.num_rows,    arguments.row_stride,       arguments.row_stride,
      arguments.vocab_start, int(arguments.num_columns), int(arguments.row_columns), arguments.inv_temperature};
  switch (arguments.dtype) {
    case ScalarType::Float: return launch<float, float, kWeighted>(rows, device);
    case ScalarType::BFloat16: return launch<__nv_bfloat16, __nv_bfloat16, kWeighted>(rows, device);
    default: return launch<__half, __half, kWeighted>(rows, device);
  }
}

void rest_softmax_(Tensor logits, Tensor targets, Tensor stats, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  overwrite_rows<false>(rows, nullptr, check_floats(stats, "stats", rows.num_rows, kNumStats, logits), logits.get_device());
}

// Takes float32 logits and does not change them; `out` may have any supported type.
void rest_softmax_into(
    Tensor logits, Tensor out, Tensor targets, Tensor stats, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  const RowArguments to(out, targets, inv_temperature, vocab_start, num_columns);
  to.check_overwritten("out");
  check_device(out, "out", logits);
  STD_TORCH_CHECK(
      rows.dtype == ScalarType::Float && to.row_columns == rows.row_columns, "rest_softmax_into: expected float32 logits and ",
      rows.row_columns, " columns of out, got scalar type ", int(rows.dtype), " and ", to.row_columns, " columns");
  float* to_stats = check_floats(stats, "stats", rows.num_rows, kNumStats, logits);
  const int device = logits.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Rows arguments{
      rows.logits,     to.logits,      rows.targets,          nullptr,               to_stats,
      rows.num_rows,   rows.row_stride, to.row_stride,        rows.vocab_start,      int(rows.num_columns),
      int(rows.row_columns), rows.inv_temperature};
  switch (to.dtype) {
    case ScalarType::Float: return launch<float, float, false>(arguments, device);
    case ScalarType::BFloat16: return launch<float, __nv_bfloat16, false>(arguments, device);
    default: return launch<float, __half, false>(arguments, device);
  }
}

void log_prob_dlogits_(
    Tensor logits, Tensor targets, Tensor weights, Tensor log_probs, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  const float* w = check_floats(weights, "weights", rows.num_rows, 1, logits);
  overwrite_rows<true>(rows, w, check_floats(log_probs, "log_probs", rows.num_rows, 1, logits), logits.get_device());
}

// Returns the CUDA error of looking up the kernels on a device, 0 if the build has code for it. A build may
// have none for a newer device.
int64_t cuda_error(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes{};
  const auto kernel = cluster_rows<__nv_bfloat16, __nv_bfloat16, false, 512>;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  cudaGetLastError();  // not the next call's error
  return int64_t(error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
}

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CUDA, m) {
  m.impl("rest_softmax_", TORCH_BOX(&rest_softmax_));
  m.impl("rest_softmax_into", TORCH_BOX(&rest_softmax_into));
  m.impl("log_prob_dlogits_", TORCH_BOX(&log_prob_dlogits_));
}

}  // namespace rlsc::cuda
