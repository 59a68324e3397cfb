// The operators on the CPU: they check their arguments and share the work of the kernels, which take raw pointers, among torch's threads.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "multi_token_loss.h"
#include "patch_embedding.h"

namespace megatron_patch {
namespace {

// With less work than this for each thread, more threads cost more than they save.
constexpr int64_t kPatchesPerThread = 32;
constexpr int64_t kRowsPerThread = 256;
constexpr int64_t kLogitsPerThread = 16384;

// Requests huge pages for a large new tensor, because page faults are the main cost of a dense gradient over a vocabulary.
void prefer_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (start + huge - 1) / huge * huge;
  const uintptr_t last = (start + tensor.numel() * tensor.element_size()) / huge * huge;
  if (first + huge < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: a failure is harmless
#endif
}

PatchIds patch_ids(const Tensor& ids, std::optional<int64_t> vocab_start, int64_t num_rows) {
  const int64_t patch_size = ids.size(ids.dim() - 1);
  return {static_cast<const int64_t*>(ids.data_ptr()), ids.numel() / patch_size, patch_size, vocab_start.value_or(0), num_rows};
}

Tensor patch_embedding(Tensor weight, Tensor token_ids, std::optional<int64_t> vocab_start) {
  require(weight.dim() == 2, "weight must be [V, H], not of ", weight.dim(), " dimensions");
  weight = torch::stable::contiguous(weight);
  token_ids = dense_integers(token_ids, "token_ids");
  const int64_t hidden = weight.size(1);
  const auto patches = patch_ids(token_ids, vocab_start, weight.size(0));
  if (!vocab_start && patches.count() > 0) {
    const auto [lowest, highest] = id_range(patches);
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
      patch_embedding_forward<T>(source, patches, hidden, target, begin, end);
    });
  });
  return out;
}

// Returns the patches of token_ids [..., K], after checking that a gradient [..., H] belongs to them.
PatchIds patches_of_gradient(const Tensor& grad, const Tensor& token_ids, std::optional<int64_t> vocab_start, int64_t num_rows) {
  const auto patches = patch_ids(token_ids, vocab_start, num_rows);
  require(grad.dim() == token_ids.dim(), "grad must be [..., H] where token_ids is [..., K]");
  require(
      grad.numel() == patches.num_patches * grad.size(grad.dim() - 1), "grad must have one row of H numbers for each patch of token_ids");
  return patches;
}

Tensor patch_embedding_backward(Tensor grad, Tensor token_ids, int64_t num_rows, std::optional<int64_t> vocab_start) {
  grad = torch::stable::contiguous(grad);
  token_ids = dense_integers(token_ids, "token_ids");
  require(num_rows >= 0, "num_rows is ", num_rows, "; allowed: 0 or more");
  const auto patches = patches_of_gradient(grad, token_ids, vocab_start, num_rows);
  const int64_t hidden = grad.size(grad.dim() - 1);
  Tensor out = torch::stable::new_empty(grad, {num_rows, hidden});
  prefer_huge_pages(out);
  const auto occurrences = find_occurrences(patches);
  dispatch(grad, "grad", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(grad.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, occurrences.work(), kRowsPerThread, [&](int64_t begin, int64_t end) {
      patch_embedding_backward_rows<T>(source, occurrences, patches.patch_size, hidden, target, begin, end);
    });
  });
  return out;
}

void patch_embedding_backward_add_(Tensor accumulator, Tensor grad, Tensor token_ids, std::optional<int64_t> vocab_start) {
  check_accumulator(accumulator, grad);
  grad = torch::stable::contiguous(grad);
  token_ids = dense_integers(token_ids, "token_ids");
  const auto patches = patches_of_gradient(grad, token_ids, vocab_start, accumulator.size(0));
  const auto occurrences = find_occurrences(patches);
  dispatch(grad, "grad", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(grad.data_ptr());
    auto* target = static_cast<Accumulator<T>*>(accumulator.data_ptr());
    torch::stable::parallel_for(0, occurrences.work(), kRowsPerThread, [&](int64_t begin, int64_t end) {
      patch_embedding_backward_add_rows<T>(source, occurrences, patches.patch_size, accumulator.size(1), target, begin, end);
    });
  });
}

LabelTable label_table(const Tensor& logits, const Tensor& labels, std::optional<int64_t> vocab_start) {
  const LabelTable table{
      static_cast<const int64_t*>(labels.data_ptr()), labels.size(0), labels.size(1), vocab_start.value_or(0), logits.size(1)};
  if (!vocab_start) {
    const auto [lowest, highest] = label_range(table);
    require(
        lowest >= 0 && highest < table.vocab, "labels range from ", lowest, " to ", highest, "; allowed: 0 to ", table.vocab - 1,
        " (the columns of logits), and ", kIgnoreIndex, " for labels that are not scored");
  }
  return table;
}

int64_t rows_per_thread(const LabelTable& table) { return std::max<int64_t>(1, kLogitsPerThread / table.vocab); }

Tensor multi_token_loss_statistics(Tensor logits, Tensor labels, std::optional<int64_t> vocab_start) {
  labels = check_logits(logits, labels);
  logits = torch::stable::contiguous(logits);
  const LabelTable table = label_table(logits, labels, vocab_start);
  Tensor out = torch::stable::new_empty(logits, {table.num_rows, 2 + table.num_labels}, accumulator(logits));
  dispatch(logits, "logits", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(logits.data_ptr());
    auto* target = static_cast<LossNumber<T>*>(out.data_ptr());
    torch::stable::parallel_for(0, table.num_rows, rows_per_thread(table), [&](int64_t begin, int64_t end) {
      loss_statistics<T>(source, table, target, begin, end);
    });
  });
  return out;
}

void gradient_into(
    const Tensor& logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start, Tensor& out) {
  labels = check_logits(logits, labels);
  const LabelTable table = label_table(logits, labels, vocab_start);
  const ScalarType type = accumulator(logits);
  normalizer = dense_numbers(normalizer, "normalizer", type, {table.num_rows, 2});
  grad_nll = dense_numbers(grad_nll, "grad_nll", type, {table.num_rows, table.num_labels});
  grad_lse = dense_numbers(grad_lse, "grad_lse", type, {table.num_rows});
  dispatch(logits, "logits", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = LossNumber<T>;
    const T* source = static_cast<const T*>(logits.data_ptr());
    T* target = static_cast<T*>(out.data_ptr());
    const A* normalizers = static_cast<const A*>(normalizer.data_ptr());
    const A* of_nll = static_cast<const A*>(grad_nll.data_ptr());
    const A* of_lse = static_cast<const A*>(grad_lse.data_ptr());
    torch::stable::parallel_for(0, table.num_rows, rows_per_thread(table), [&](int64_t begin, int64_t end) {
      loss_gradient<T>(source, table, normalizers, of_nll, of_lse, target, begin, end);
    });
  });
}

Tensor multi_token_loss_gradient(
    Tensor logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start) {
  logits = torch::stable::contiguous(logits);
  Tensor out = torch::stable::empty_like(logits);
  prefer_huge_pages(out);
  gradient_into(logits, labels, normalizer, grad_nll, grad_lse, vocab_start, out);
  return out;
}

void multi_token_loss_gradient_(
    Tensor logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start) {
  check_in_place(logits);
  gradient_into(logits, labels, normalizer, grad_nll, grad_lse, vocab_start, logits);
}

Tensor multi_token_loss_and_gradient_(Tensor logits, Tensor labels, std::optional<Tensor> label_weights, double z_loss) {
  labels = check_logits(logits, labels);
  check_in_place(logits);
  const LabelTable table = label_table(logits, labels, std::nullopt);
  if (label_weights) label_weights = dense_numbers(*label_weights, "label_weights", accumulator(logits), {table.num_labels});
  Tensor out = torch::stable::new_empty(logits, {table.num_rows}, accumulator(logits));
  dispatch(logits, "logits", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = LossNumber<T>;
    T* rows = static_cast<T*>(logits.data_ptr());
    const A* weights = label_weights ? static_cast<const A*>(label_weights->data_ptr()) : nullptr;
    A* losses = static_cast<A*>(out.data_ptr());
    torch::stable::parallel_for(0, table.num_rows, rows_per_thread(table), [&](int64_t begin, int64_t end) {
      loss_and_gradient<T>(rows, table, weights, static_cast<A>(z_loss), losses, begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace megatron_patch

STABLE_TORCH_LIBRARY_IMPL(megatron_patch, CPU, m) {
  using namespace megatron_patch;
  m.impl("patch_embedding", TORCH_BOX(&patch_embedding));
  m.impl("patch_embedding_backward", TORCH_BOX(&patch_embedding_backward));
  m.impl("patch_embedding_backward_add_", TORCH_BOX(&patch_embedding_backward_add_));
  m.impl("multi_token_loss_statistics", TORCH_BOX(&multi_token_loss_statistics));
  m.impl("multi_token_loss_gradient", TORCH_BOX(&multi_token_loss_gradient));
  m.impl("multi_token_loss_gradient_", TORCH_BOX(&multi_token_loss_gradient_));
  m.impl("multi_token_loss_and_gradient_", TORCH_BOX(&multi_token_loss_and_gradient_));
}
