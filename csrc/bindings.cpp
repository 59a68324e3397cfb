// The operators' schemas and their CPU implementations, on torch's stable ABI: one build serves torch 2.11 and later.
// Autograd and shapes for tracing are registered in Python (megatron_patch/ops/native.py).
// Bad arguments are std::invalid_argument, which torch hands to Python as ValueError.
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/patch_embedding.h"

namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

// Below this much work a second thread costs more than it saves.
constexpr int64_t kPatchesPerThread = 32;
constexpr int64_t kRowsPerThread = 256;

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename Run>
void dispatch(const Tensor& tensor, const char* name, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::Double: return run(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half: return run(static_cast<c10::Half*>(nullptr));
    default: require(false, name, " is ", toString(tensor.scalar_type()), "; allowed: float32, bfloat16, float16, float64");
  }
}

// Asks for huge pages under a large fresh tensor: a dense gradient of a vocabulary is mostly the cost of its first touch.
void prefer_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (start + huge - 1) / huge * huge;
  const uintptr_t last = (start + tensor.numel() * tensor.element_size()) / huge * huge;
  if (first + huge < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice only: failing is harmless
#endif
}

// token_ids as the kernels read them: int64 on the CPU, [..., K], contiguous.
Tensor dense_ids(const Tensor& token_ids) {
  const ScalarType type = token_ids.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, "token_ids are ", toString(type), "; allowed: int64, int32");
  require(token_ids.dim() >= 1, "token_ids must be [..., K], not a single number");
  require(token_ids.size(token_ids.dim() - 1) >= 1, "token_ids must be [..., K] with K >= 1, not K = 0");
  return torch::stable::contiguous(type == ScalarType::Long ? token_ids : torch::stable::to(token_ids, ScalarType::Long));
}

megatron_patch::PatchIds patch_ids(const Tensor& ids, std::optional<int64_t> vocab_start, int64_t num_rows) {
  const int64_t patch_size = ids.size(ids.dim() - 1);
  return {static_cast<const int64_t*>(ids.data_ptr()), ids.numel() / patch_size, patch_size, vocab_start.value_or(0), num_rows};
}

Tensor patch_embedding(Tensor weight, Tensor token_ids, std::optional<int64_t> vocab_start) {
  require(weight.dim() == 2, "weight must be [V, H], not of ", weight.dim(), " dimensions");
  weight = torch::stable::contiguous(weight);
  token_ids = dense_ids(token_ids);
  const int64_t hidden = weight.size(1);
  const auto patches = patch_ids(token_ids, vocab_start, weight.size(0));
  if (!vocab_start && patches.count() > 0) {
    const auto [lowest, highest] = megatron_patch::id_range(patches);
    require(
        lowest >= 0 && highest < patches.num_rows, "token_ids range from ", lowest, " to ", highest, "; allowed: 0 to ", patches.num_rows - 1,
        ", the rows of weight");
  }
  std::vector<int64_t> shape(token_ids.sizes().begin(), token_ids.sizes().end());
  shape.back() = hidden;
  Tensor out = torch::stable::new_empty(weight, shape);
  dispatch(weight, "weight", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(weight.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, patches.num_patches, kPatchesPerThread, [&](int64_t begin, int64_t end) {
      megatron_patch::patch_embedding_forward<T>(source, patches, hidden, target, begin, end);
    });
  });
  return out;
}

Tensor patch_embedding_backward(Tensor grad, Tensor token_ids, int64_t num_rows, std::optional<int64_t> vocab_start) {
  grad = torch::stable::contiguous(grad);
  token_ids = dense_ids(token_ids);
  require(num_rows >= 0, "num_rows is ", num_rows, "; allowed: 0 and more");
  const auto patches = patch_ids(token_ids, vocab_start, num_rows);
  require(grad.dim() == token_ids.dim(), "grad must be [..., H] where token_ids is [..., K]");
  const int64_t hidden = grad.size(grad.dim() - 1);
  require(grad.numel() == patches.num_patches * hidden, "grad must have one row of H numbers for each patch of token_ids");
  Tensor out = torch::stable::new_empty(grad, {num_rows, hidden});
  prefer_huge_pages(out);
  const auto occurrences = megatron_patch::find_occurrences(patches);
  dispatch(grad, "grad", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(grad.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, occurrences.work(), kRowsPerThread, [&](int64_t begin, int64_t end) {
      megatron_patch::patch_embedding_backward<T>(source, occurrences, patches.patch_size, hidden, target, begin, end);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_patch, m) {
  m.def("patch_embedding(Tensor weight, Tensor token_ids, int? vocab_start=None) -> Tensor");
  m.def("patch_embedding_backward(Tensor grad, Tensor token_ids, int num_rows, int? vocab_start=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_patch, CPU, m) {
  m.impl("patch_embedding", TORCH_BOX(&patch_embedding));
  m.impl("patch_embedding_backward", TORCH_BOX(&patch_embedding_backward));
}
