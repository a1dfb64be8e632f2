// Check the arguments that the row ops share. The tensors come from Python, so each message names what to
// change.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace rlsc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fails unless `tensor` is on the device of `like`, because a kernel reads every pointer as memory of one
// device.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
      name, ": expected on the device of the op's first tensor (", like.is_cuda() ? "cuda:" : "cpu:", int(like.get_device_index()),
      "), got ", tensor.is_cuda() ? "cuda:" : "cpu:", int(tensor.get_device_index()));
}

inline float* check_floats(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, const Tensor& like) {
  check_device(tensor, name, like);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == rows * columns, name,
      ": expected contiguous float32 with ", rows, " x ", columns, " elements, got ", tensor.numel());
  return static_cast<float*>(tensor.data_ptr());
}

// Statistics of a row (rlsc_mcore/ops/reference.py): [T, 3], or [T, 4] with the entropy of the rest. Shape
// suffixes as in that file: T tokens (rows of logits), Vp vocabulary columns with padding.
constexpr int kTop = 0, kLogSum = 1, kTarget = 2, kRestEntropy = 3, kNumStats = 3;

inline int check_num_stats(const Tensor& stats) {
  STD_TORCH_CHECK(
      stats.dim() == 2 && (stats.size(1) == kNumStats || stats.size(1) == kNumStats + 1), "stats: expected [T, 3] or [T, 4], got ",
      stats.dim(), " dims with ", stats.dim() == 2 ? stats.size(1) : 0, " columns");
  return int(stats.size(1));
}

// Rows of logits and their targets; see rlsc_mcore/ops/reference.py.
struct RowArguments {
  void* logits;
  const int64_t* targets;
  ScalarType dtype;
  int64_t num_rows, row_stride, row_columns;  // columns with padding
  int64_t vocab_start, num_columns;           // columns without
  float inv_temperature;

  RowArguments(const Tensor& logits_tensor, const Tensor& targets_tensor, double inv_temperature_, int64_t vocab_start_, int64_t num_columns_)
      : logits(logits_tensor.data_ptr()),
        targets(static_cast<const int64_t*>(targets_tensor.data_ptr())),
        dtype(logits_tensor.scalar_type()),
        num_rows(check_matrix(logits_tensor).size(0)),
        row_stride(logits_tensor.stride(0)),
        row_columns(logits_tensor.size(1)),
        vocab_start(vocab_start_),
        num_columns(num_columns_),
        inv_temperature(float(inv_temperature_)) {
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "logits: expected float32, bfloat16 or float16, got scalar type ", int(dtype));
    STD_TORCH_CHECK(row_columns <= 1 || logits_tensor.stride(1) == 1, "logits: expected [T, Vp] with contiguous rows");
    check_device(targets_tensor, "targets", logits_tensor);
    STD_TORCH_CHECK(
        targets_tensor.scalar_type() == ScalarType::Long && targets_tensor.is_contiguous() && targets_tensor.numel() == num_rows,
        "targets: expected contiguous int64 [", num_rows, "], got ", targets_tensor.numel(), " elements");
    STD_TORCH_CHECK(
        num_columns >= 0 && num_columns <= row_columns, "num_columns: expected 0 to ", row_columns, ", got ", num_columns);
  }

  // Fails if writing these rows would overwrite memory of another row.
  const RowArguments& check_overwritten(const char* name) const {
    STD_TORCH_CHECK(
        num_rows <= 1 || row_stride >= row_columns, name, ": expected rows of ", row_columns,
        " columns that share no memory, got row stride ", row_stride);
    return *this;
  }

  static const Tensor& check_matrix(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2, "logits: expected [T, Vp], got ", tensor.dim(), " dims");
    return tensor;
  }

  template <typename T>
  T* row(int64_t r) const {
    return static_cast<T*>(logits) + r * row_stride;
  }
};

struct SequenceArguments {
  const float* values;
  const bool* mask;
  const int32_t* cu_seqlens;
  double* sums;
  int64_t num_sequences;

  SequenceArguments(const Tensor& values_tensor, const Tensor& mask_tensor, const Tensor& cu_seqlens_tensor, const Tensor& sums_tensor)
      : values(check_floats(values_tensor, "values", values_tensor.numel(), 1, values_tensor)),
        mask(static_cast<const bool*>(mask_tensor.data_ptr())),
        cu_seqlens(static_cast<const int32_t*>(cu_seqlens_tensor.data_ptr())),
        sums(static_cast<double*>(sums_tensor.data_ptr())),
        num_sequences(cu_seqlens_tensor.numel() - 1) {
    check_device(mask_tensor, "mask", values_tensor);
    check_device(cu_seqlens_tensor, "cu_seqlens", values_tensor);
    check_device(sums_tensor, "sums", values_tensor);
    STD_TORCH_CHECK(
        mask_tensor.scalar_type() == ScalarType::Bool && mask_tensor.is_contiguous() && mask_tensor.numel() == values_tensor.numel(),
        "mask: expected contiguous bool [", values_tensor.numel(), "], got ", mask_tensor.numel(), " elements");
    STD_TORCH_CHECK(
        cu_seqlens_tensor.scalar_type() == ScalarType::Int && cu_seqlens_tensor.is_contiguous() && num_sequences >= 0,
        "cu_seqlens: expected contiguous int32 [S + 1], got ", cu_seqlens_tensor.numel(), " elements");
    STD_TORCH_CHECK(
        sums_tensor.scalar_type() == ScalarType::Double && sums_tensor.is_contiguous() && sums_tensor.numel() == num_sequences,
        "sums: expected contiguous float64 [", num_sequences, "], got ", sums_tensor.numel(), " elements");
  }
};

}  // namespace rlsc
