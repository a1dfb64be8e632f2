// Sum masked values of packed sequences in float64, in token order, one sequence at a time.
#include "../row_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace rlsc::cpu {
namespace {

void sequence_sums(Tensor values, Tensor mask, Tensor cu_seqlens, Tensor sums) {
  const SequenceArguments sequences(values, mask, cu_seqlens, sums);
  torch::stable::parallel_for(0, sequences.num_sequences, 64, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double sum = 0.0;
      for (int32_t t = sequences.cu_seqlens[s]; t < sequences.cu_seqlens[s + 1]; ++t) {
        if (sequences.mask[t]) sum += double(sequences.values[t]);
      }
      sequences.sums[s] = sum;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CPU, m) {
  m.impl("sequence_sums", TORCH_BOX(&sequence_sums));
}

}  // namespace rlsc::cpu
