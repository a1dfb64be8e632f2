// Declare the schemas of the native row ops (torch.ops.rlsc_native). rlsc_mcore/ops/native.py allocates the
// outputs.
#include <torch/csrc/stable/library.h>

namespace {

// Increment with every change of a schema or of an op's result; native.py rejects a library of another
// version.
constexpr int64_t kVersion = 5;

int64_t version() { return kVersion; }

}  // namespace

STABLE_TORCH_LIBRARY(rlsc_native, m) {
  m.def("version() -> int");
  m.def("cuda_error(int device) -> int");
  m.def(
      "log_prob_stats(Tensor logits, Tensor targets, Tensor(a!) stats, Tensor(b!) log_probs, float inv_temperature, int vocab_start, "
      "int num_columns) -> ()");
  m.def(
      "dlogits(Tensor grad_stats, Tensor stats, Tensor logits, Tensor targets, Tensor(a!) out, float inv_temperature, int vocab_start, "
      "int num_columns) -> ()");
  m.def("rest_softmax_(Tensor(a!) logits, Tensor targets, Tensor(b!) stats, float inv_temperature, int vocab_start, int num_columns) -> ()");
  m.def(
      "rest_softmax_into(Tensor(a!) logits, Tensor(b!) out, Tensor targets, Tensor(c!) stats, float inv_temperature, int vocab_start, "
      "int num_columns) -> ()");
  m.def(
      "log_prob_dlogits_(Tensor(a!) logits, Tensor targets, Tensor weights, Tensor(b!) log_probs, float inv_temperature, "
      "int vocab_start, int num_columns) -> ()");
  m.def("sequence_sums(Tensor values, Tensor mask, Tensor cu_seqlens, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlsc_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&version));
}
