// The schemas of the compiled operators. Their implementations are in cpu/bindings.cpp and cuda/bindings.cpp. Their autograd formulas,
// their shapes for tracing, and the operators composed of them are in fused_linear_loss.py (which training uses), fused_loss.py and
// fused_embedding.py of megatron_patch/ops.
// Everything uses torch's stable ABI: one build works with torch 2.11 and later.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megatron_patch, m) {
  m.def("patch_embedding(Tensor weight, Tensor token_ids, int? vocab_start=None) -> Tensor");
  m.def("patch_embedding_backward(Tensor grad, Tensor token_ids, int num_rows, int? vocab_start=None) -> Tensor");
  m.def("patch_embedding_backward_add_(Tensor(a!) accumulator, Tensor grad, Tensor token_ids, int? vocab_start=None) -> ()");
  m.def("multi_token_loss_statistics(Tensor logits, Tensor labels, int? vocab_start=None) -> Tensor");
  m.def(
      "multi_token_loss_gradient(Tensor logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, int? vocab_start=None) "
      "-> Tensor");
  m.def(
      "multi_token_loss_gradient_(Tensor(a!) logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, "
      "int? vocab_start=None) -> ()");
  m.def("multi_token_loss_and_gradient_(Tensor(a!) logits, Tensor labels, Tensor? label_weights=None, float z_loss=0.0) -> Tensor");
}
