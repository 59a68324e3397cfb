// The operators' schemas and their CPU implementations, on torch's stable ABI: one build serves torch 2.11 and later.
// Autograd and shapes for tracing are registered in Python (megatron_patch/ops/native.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/patch_embedding.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPatchesPerThread = 32;
constexpr int64_t kRowsPerThread = 256;

template <typename F>
void dispatch(ScalarType type, const F& run) {
  switch (type) {
    case ScalarType::Float: run(static_cast<float*>(nullptr)); break;
    case ScalarType::BFloat16: run(static_cast<c10::BFloat16*>(nullptr)); break;
    case ScalarType::Half: run(static_cast<c10::Half*>(nullptr)); break;
    default: STD_TORCH_CHECK(false, "patch_embedding: float32, bfloat16 and float16 are supported");
  }
}

megatron_patch::PatchIds patch_ids(const Tensor& token_ids, int64_t first_row, int64_t num_rows) {
  STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Long, "patch_embedding: token_ids must be int64");
  STD_TORCH_CHECK(token_ids.dim() >= 1 && token_ids.size(token_ids.dim() - 1) >= 1, "patch_embedding: token_ids must be [..., K] with K >= 1");
  const int64_t patch_size = token_ids.size(token_ids.dim() - 1);
  return {static_cast<const int64_t*>(token_ids.data_ptr()), token_ids.numel() / patch_size, patch_size, first_row, num_rows};
}

Tensor patch_embedding(Tensor weight, Tensor token_ids, int64_t vocab_start) {
  STD_TORCH_CHECK(weight.dim() == 2, "patch_embedding: weight must be [V, H]");
  weight = torch::stable::contiguous(weight);
  token_ids = torch::stable::contiguous(token_ids);
  const auto patches = patch_ids(token_ids, vocab_start, weight.size(0));
  const int64_t hidden = weight.size(1);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < token_ids.dim(); ++i) shape.push_back(token_ids.size(i));
  shape.push_back(hidden);
  Tensor out = torch::stable::new_empty(weight, shape);
  dispatch(weight.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(weight.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, patches.num_patches, kPatchesPerThread, [&](int64_t begin, int64_t end) {
      megatron_patch::patch_embedding_forward<T>(source, patches, hidden, target, begin, end);
    });
  });
  return out;
}

Tensor patch_embedding_backward(Tensor grad, Tensor token_ids, int64_t num_rows, int64_t vocab_start) {
  grad = torch::stable::contiguous(grad);
  token_ids = torch::stable::contiguous(token_ids);
  const auto patches = patch_ids(token_ids, vocab_start, num_rows);
  const int64_t hidden = grad.size(grad.dim() - 1);
  Tensor out = torch::stable::new_empty(grad, {num_rows, hidden});
  const auto rows = megatron_patch::find_occurrences(patches);
  dispatch(grad.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(grad.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, num_rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      megatron_patch::patch_embedding_backward<T>(source, rows, patches.patch_size, hidden, target, begin, end);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_patch, m) {
  m.def("patch_embedding(Tensor weight, Tensor token_ids, int vocab_start) -> Tensor");
  m.def("patch_embedding_backward(Tensor grad, Tensor token_ids, int num_rows, int vocab_start) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_patch, CPU, m) {
  m.impl("patch_embedding", TORCH_BOX(&patch_embedding));
  m.impl("patch_embedding_backward", TORCH_BOX(&patch_embedding_backward));
}
