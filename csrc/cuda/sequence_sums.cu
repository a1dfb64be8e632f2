// Masked sums of packed sequences: float64, one block per sequence, every sum in a fixed order and without atomics.
#include "../row_ops.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK: torch 2.11 includes it from nowhere else

namespace rlsc::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) sum_sequences(const float* values, const bool* mask, const int32_t* cu_seqlens, double* sums) {
  const int stop = cu_seqlens[blockIdx.x + 1];
  double sum = 0.0;
  for (int t = cu_seqlens[blockIdx.x] + int(threadIdx.x); t < stop; t += kThreads) {
    if (mask[t]) sum += double(values[t]);
  }
  __shared__ double partial[kThreads];
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

void sequence_sums(Tensor values, Tensor mask, Tensor cu_seqlens, Tensor sums) {
  const SequenceArguments sequences(values, mask, cu_seqlens, sums);
  if (sequences.num_sequences == 0) return;
  const int device = values.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  sum_sequences<<<unsigned(sequences.num_sequences), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      sequences.values, sequences.mask, sequences.cu_seqlens, sequences.sums);
  STD_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CUDA, m) {
  m.impl("sequence_sums", TORCH_BOX(&sequence_sums));
}

}  // namespace rlsc::cuda
