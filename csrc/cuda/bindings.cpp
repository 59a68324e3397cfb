// The operators on CUDA: they check their arguments and launch kernels on torch's current stream. They never wait for the GPU: the kernels
// themselves find ids and labels out of range, print them and trap, which ends the process's CUDA work.
#include <optional>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "launch.h"

// Part of torch's stable C interface, whose header declares this function only where torch itself was built with CUDA.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// `python -m megatron_patch.ops` finds this text in the library's bytes, even where the library does not load.
extern "C" __attribute__((used, visibility("default"))) const char megatron_patch_architectures[] =
    "megatron_patch architectures: " MEGATRON_PATCH_ARCHITECTURES;

namespace megatron_patch {
namespace {

using cuda::NumberType;

NumberType number_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return NumberType::kFloat;
    case ScalarType::Double: return NumberType::kDouble;
    case ScalarType::BFloat16: return NumberType::kBFloat16;
    case ScalarType::Half: return NumberType::kHalf;
    default: require(false, name, " is ", toString(tensor.scalar_type()), "; allowed: float32, bfloat16, float16, float64");
  }
  return NumberType::kFloat;
}

// The index of a tensor's GPU. The tensor can be on the CPU where another argument, on a GPU, selected this operator.
int32_t gpu_of(const Tensor& tensor, const char* name) {
  require(tensor.is_cuda(), name, " must be on the same GPU as the other arguments");
  return tensor.get_device_index();
}

// Makes the tensor's device the current one during the object's lifetime; kernels run on its current stream.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& tensor, const char* name) : guard_(gpu_of(tensor, name)) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
      throw std::runtime_error("torch has no current CUDA stream for this device");
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_launch(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

void require_same_device(const Tensor& tensor, const char* name, const Tensor& other) {
  require(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name, " must be on the same GPU as the other arguments");
}

Tensor patch_embedding(Tensor weight, Tensor token_ids, std::optional<int64_t> vocab_start) {
  require(weight.dim() == 2, "weight must be [V, H], not of ", weight.dim(), " dimensions");
  const OnDeviceOf here(weight, "weight");
  require_same_device(token_ids, "token_ids", weight);
  const NumberType type = number_type(weight, "weight");
  weight = torch::stable::contiguous(weight);
  token_ids = dense_integers(token_ids, "token_ids");
  std::vector<int64_t> shape(token_ids.sizes().begin(), token_ids.sizes().end());
  const int64_t patch_size = shape.back(), hidden = weight.size(1);
  shape.back() = hidden;
  Tensor out = torch::stable::new_empty(weight, shape);
  check_launch(
      cuda::mp_patch_embedding_forward(
          type, weight.data_ptr(), static_cast<const int64_t*>(token_ids.data_ptr()), token_ids.numel() / patch_size, patch_size, hidden,
          vocab_start.value_or(0), weight.size(0), !vocab_start, out.data_ptr(), here.stream()),
      "patch_embedding");
  return out;
}

// The keys by which torch sorts in the backward pass. They are int32, so that the sort needs half as many passes as with int64.
Tensor patch_embedding_rows(Tensor token_ids, int64_t num_rows, std::optional<int64_t> vocab_start) {
  const OnDeviceOf here(token_ids, "token_ids");
  token_ids = dense_integers(token_ids, "token_ids");
  require(num_rows >= 0 && num_rows <= cuda::kMaxRows, "num_rows is ", num_rows, "; allowed: 0 to ", cuda::kMaxRows);
  const int64_t count = token_ids.numel();
  Tensor out = torch::stable::new_empty(token_ids, {count}, ScalarType::Int);
  check_launch(
      cuda::mp_patch_embedding_rows(
          static_cast<const int64_t*>(token_ids.data_ptr()), count, vocab_start.value_or(0), num_rows,
          static_cast<int32_t*>(out.data_ptr()), here.stream()),
      "patch_embedding_rows");
  return out;
}

// The backward pass after the sort: writes a new table of the gradient's type, or adds to the accumulator.
void sorted_backward(Tensor grad, Tensor sorted_rows, Tensor order, int64_t patch_size, bool accumulate, Tensor& target) {
  require(grad.dim() == 2, "grad must be [patches, H]");
  require_same_device(sorted_rows, "sorted_rows", grad);
  require_same_device(order, "order", grad);
  require_same_device(target, "accumulator", grad);
  const int64_t count = sorted_rows.numel(), hidden = grad.size(1);
  require(
      sorted_rows.scalar_type() == ScalarType::Int && order.scalar_type() == ScalarType::Long && order.numel() == count &&
          count == grad.size(0) * patch_size,
      "sorted_rows must be int32 and order int64, each of patches * patch_size numbers");
  const OnDeviceOf here(grad, "grad");
  const NumberType type = number_type(grad, "grad");
  grad = torch::stable::contiguous(grad);
  sorted_rows = torch::stable::contiguous(sorted_rows);
  order = torch::stable::contiguous(order);
  Tensor partial = torch::stable::new_empty(grad, {(count + cuda::kTile - 1) / cuda::kTile, 2, hidden}, accumulator(grad));
  check_launch(
      cuda::mp_patch_embedding_backward(
          type, grad.data_ptr(), static_cast<const int32_t*>(sorted_rows.data_ptr()), static_cast<const int64_t*>(order.data_ptr()), count,
          patch_size, hidden, target.size(0), partial.data_ptr(), target.data_ptr(), accumulate, here.stream()),
      "patch_embedding_backward");
}

Tensor patch_embedding_sorted_backward(Tensor grad, Tensor sorted_rows, Tensor order, int64_t patch_size, int64_t num_rows) {
  require(grad.dim() == 2, "grad must be [patches, H]");
  require(num_rows >= 0 && num_rows <= cuda::kMaxRows, "num_rows is ", num_rows, "; allowed: 0 to ", cuda::kMaxRows);
  Tensor out = torch::stable::new_zeros(grad, {num_rows, grad.size(1)});
  sorted_backward(grad, sorted_rows, order, patch_size, false, out);
  return out;
}

void patch_embedding_sorted_backward_add_(Tensor table, Tensor grad, Tensor sorted_rows, Tensor order, int64_t patch_size) {
  check_accumulator(table, grad);
  sorted_backward(grad, sorted_rows, order, patch_size, true, table);
}

// Returns logits whose rows are contiguous, at any distance from each other; others are copied.
Tensor dense_rows(const Tensor& logits) {
  return logits.stride(1) == 1 && logits.stride(0) >= logits.size(1) ? logits : torch::stable::contiguous(logits);
}

Tensor checked_labels(const Tensor& logits, const Tensor& labels) {
  require_same_device(labels, "labels", logits);
  Tensor dense = check_logits(logits, labels);
  require(dense.size(1) <= cuda::kMaxLabels, "labels must be [N, K] with K <= ", cuda::kMaxLabels, " on a GPU, not K = ", dense.size(1));
  return dense;
}

Tensor multi_token_loss_statistics(Tensor logits, Tensor labels, std::optional<int64_t> vocab_start) {
  const OnDeviceOf here(logits, "logits");
  const NumberType type = number_type(logits, "logits");
  labels = checked_labels(logits, labels);
  logits = dense_rows(logits);
  Tensor out = torch::stable::new_empty(logits, {labels.size(0), 2 + labels.size(1)}, accumulator(logits));
  check_launch(
      cuda::mp_loss_statistics(
          type, logits.data_ptr(), logits.stride(0), static_cast<const int64_t*>(labels.data_ptr()), labels.size(0), labels.size(1),
          vocab_start.value_or(0), logits.size(1), !vocab_start, out.data_ptr(), here.stream()),
      "multi_token_loss_statistics");
  return out;
}

void gradient_into(
    const Tensor& logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start, Tensor& out) {
  const OnDeviceOf here(logits, "logits");
  const NumberType type = number_type(logits, "logits");
  labels = checked_labels(logits, labels);
  const ScalarType number = accumulator(logits);
  normalizer = dense_numbers(normalizer, "normalizer", number, {labels.size(0), 2});
  grad_nll = dense_numbers(grad_nll, "grad_nll", number, {labels.size(0), labels.size(1)});
  grad_lse = dense_numbers(grad_lse, "grad_lse", number, {labels.size(0)});
  require_same_device(normalizer, "normalizer", logits);
  require_same_device(grad_nll, "grad_nll", logits);
  require_same_device(grad_lse, "grad_lse", logits);
  check_launch(
      cuda::mp_loss_gradient(
          type, logits.data_ptr(), logits.stride(0), static_cast<const int64_t*>(labels.data_ptr()), labels.size(0), labels.size(1),
          vocab_start.value_or(0), logits.size(1), normalizer.data_ptr(), grad_nll.data_ptr(), grad_lse.data_ptr(), out.data_ptr(),
          out.stride(0), here.stream()),
      "multi_token_loss_gradient");
}

Tensor multi_token_loss_gradient(
    Tensor logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start) {
  require(logits.dim() == 2, "logits must be [N, V], not of ", logits.dim(), " dimensions");
  logits = dense_rows(logits);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  gradient_into(logits, labels, normalizer, grad_nll, grad_lse, vocab_start, out);
  return out;
}

void multi_token_loss_gradient_(
    Tensor logits, Tensor labels, Tensor normalizer, Tensor grad_nll, Tensor grad_lse, std::optional<int64_t> vocab_start) {
  check_in_place(logits);
  gradient_into(logits, labels, normalizer, grad_nll, grad_lse, vocab_start, logits);
}

Tensor multi_token_loss_and_gradient_(Tensor logits, Tensor labels, std::optional<Tensor> label_weights, double z_loss) {
  const OnDeviceOf here(logits, "logits");
  const NumberType type = number_type(logits, "logits");
  labels = checked_labels(logits, labels);
  check_in_place(logits);
  if (label_weights) {
    require_same_device(*label_weights, "label_weights", logits);
    label_weights = dense_numbers(*label_weights, "label_weights", accumulator(logits), {labels.size(1)});
  }
  Tensor out = torch::stable::new_empty(logits, {labels.size(0)}, accumulator(logits));
  check_launch(
      cuda::mp_loss_and_gradient(
          type, logits.data_ptr(), logits.stride(0), static_cast<const int64_t*>(labels.data_ptr()), labels.size(0), labels.size(1),
          logits.size(1), label_weights ? label_weights->data_ptr() : nullptr, z_loss, out.data_ptr(), here.stream()),
      "multi_token_loss_and_gradient");
  return out;
}

}  // namespace
}  // namespace megatron_patch

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_patch, m) {
  m.def("patch_embedding_rows(Tensor token_ids, int num_rows, int? vocab_start=None) -> Tensor");
  m.def("patch_embedding_sorted_backward(Tensor grad, Tensor sorted_rows, Tensor order, int patch_size, int num_rows) -> Tensor");
  m.def(
      "patch_embedding_sorted_backward_add_(Tensor(a!) accumulator, Tensor grad, Tensor sorted_rows, Tensor order, int patch_size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_patch, CUDA, m) {
  using namespace megatron_patch;
  m.impl("patch_embedding", TORCH_BOX(&patch_embedding));
  m.impl("patch_embedding_rows", TORCH_BOX(&patch_embedding_rows));
  m.impl("patch_embedding_sorted_backward", TORCH_BOX(&patch_embedding_sorted_backward));
  m.impl("patch_embedding_sorted_backward_add_", TORCH_BOX(&patch_embedding_sorted_backward_add_));
  m.impl("multi_token_loss_statistics", TORCH_BOX(&multi_token_loss_statistics));
  m.impl("multi_token_loss_gradient", TORCH_BOX(&multi_token_loss_gradient));
  m.impl("multi_token_loss_gradient_", TORCH_BOX(&multi_token_loss_gradient_));
  m.impl("multi_token_loss_and_gradient_", TORCH_BOX(&multi_token_loss_and_gradient_));
}
