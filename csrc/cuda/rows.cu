// rest_softmax_ and log_prob_dlogits_ on CUDA: which kernel takes the rows, and how it is laid out over the device.
#include "../row_ops.h"
#include "rows_cluster.cuh"
#include "rows_streaming.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK: torch 2.11 includes it from nowhere else

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace rlsc::cuda {
namespace {

constexpr int kSliceTarget = 38144;  // bytes: two of them, three times, fill a multiprocessor's shared memory; V = 152064 / 8 fits
constexpr int kStages = 2;

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

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// RLSC_ROWS_LAYOUT=cluster:stages overrides the layout, for measuring others (docs/kernels.md).
struct Tuning {
  int cluster = 0, stages = 0;

  static Tuning from_environment() {
    Tuning tuning;
    const char* value = std::getenv("RLSC_ROWS_LAYOUT");
    if (value != nullptr) std::sscanf(value, "%d:%d", &tuning.cluster, &tuning.stages);
    return tuning;
  }
};

// Spreads a row over as few blocks as keep a slice small; no stages where it does not fit, is not aligned or the device is older.
ClusterLayout choose_layout(const Rows& rows, int element_size, int device) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.row_stride * element_size % 16 == 0;
  if (!is_aligned || device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return {};
  const int row_bytes = rows.num_columns / (16 / element_size) * 16;
  static const Tuning tuned = Tuning::from_environment();
  int cluster = tuned.cluster > 0 ? std::min(tuned.cluster, kMaxCluster) : 1;
  while (tuned.cluster == 0 && cluster < kMaxCluster && round_up(row_bytes / cluster, 16) > kSliceTarget) cluster *= 2;
  const int vectors = row_bytes / 16, slice_bytes = std::max((vectors + cluster - 1) / cluster, 1) * 16;
  const int available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 2048;  // less the kernel's own variables
  const int stages = std::min(tuned.stages > 0 ? std::min(tuned.stages, kMaxStages) : kStages, available / slice_bytes);
  return {cluster, stages >= 2 ? stages : 0, slice_bytes};
}

template <typename T, bool kWeighted>
void launch_cluster(const Rows& rows, const ClusterLayout& layout, int device, cudaStream_t stream) {
  const auto kernel = cluster_rows<T, kWeighted>;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(layout.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = size_t(layout.stages) * layout.slice_bytes;
  config.gridDim = dim3(layout.cluster);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;

  // How many clusters are resident at once decides the grid; the driver is asked once per layout and device.
  static std::mutex mutex;
  static std::unordered_map<int64_t, int> resident;
  int num_clusters = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const int64_t key = (int64_t(device) << 40) | (int64_t(layout.cluster) << 32) | int64_t(config.dynamicSmemBytes);
    int& known = resident[key];
    if (known == 0) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 2048));
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&known, kernel, &config));
      STD_TORCH_CHECK(known > 0, "no cluster of ", layout.cluster, " blocks with ", config.dynamicSmemBytes, " bytes fits this device");
    }
    num_clusters = known;
  }
  config.gridDim = dim3(unsigned(std::min<int64_t>(rows.num_rows, num_clusters)) * layout.cluster);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, rows, layout.stages, layout.slice_bytes));
}

template <typename T, bool kWeighted>
void launch(const Rows& rows, int device) {
  if (rows.num_rows == 0) return;
  const cudaStream_t stream = current_stream(device);
  const ClusterLayout layout = choose_layout(rows, sizeof(T), device);
  if (layout.stages > 0) return launch_cluster<T, kWeighted>(rows, layout, device, stream);
  streaming_rows<T, kWeighted><<<unsigned(rows.num_rows), kStreamingThreads, 0, stream>>>(rows);
  STD_CUDA_CHECK(cudaGetLastError());
}

template <bool kWeighted>
void overwrite_rows(const RowArguments& arguments, const float* weights, float* out, int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Rows rows{
      arguments.logits,      arguments.targets,          weights, out, arguments.num_rows, arguments.row_stride, arguments.vocab_start,
      int(arguments.num_columns), int(arguments.row_columns), arguments.inv_temperature};
  switch (arguments.dtype) {
    case ScalarType::Float: return launch<float, kWeighted>(rows, device);
    case ScalarType::BFloat16: return launch<__nv_bfloat16, kWeighted>(rows, device);
    default: return launch<__half, kWeighted>(rows, device);
  }
}

void rest_softmax_(Tensor logits, Tensor targets, Tensor stats, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  overwrite_rows<false>(rows, nullptr, check_floats(stats, "stats", rows.num_rows, kNumStats, logits), logits.get_device());
}

void log_prob_dlogits_(
    Tensor logits, Tensor targets, Tensor weights, Tensor log_probs, double inv_temperature, int64_t vocab_start, int64_t num_columns) {
  const RowArguments rows(logits, targets, inv_temperature, vocab_start, num_columns);
  rows.check_overwritten("logits");
  const float* w = check_floats(weights, "weights", rows.num_rows, 1, logits);
  overwrite_rows<true>(rows, w, check_floats(log_probs, "log_probs", rows.num_rows, 1, logits), logits.get_device());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CUDA, m) {
  m.impl("rest_softmax_", TORCH_BOX(&rest_softmax_));
  m.impl("log_prob_dlogits_", TORCH_BOX(&log_prob_dlogits_));
}

}  // namespace rlsc::cuda
