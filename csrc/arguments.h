// Checks of arguments that the bindings of both devices share. A wrong one throws std::invalid_argument, in Python a ValueError.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace megatron_patch {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Calls `run` with a null pointer of the tensor's number type, which selects the template.
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

// Returns integers [..., K], K >= 1, as the kernels read them: int64 and contiguous.
inline Tensor dense_integers(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, name, " has dtype ", toString(type), "; allowed: int64, int32");
  require(tensor.dim() >= 1, name, " must be [..., K], not a single number");
  require(tensor.size(tensor.dim() - 1) >= 1, name, " must be [..., K] with K >= 1, not K = 0");
  return torch::stable::contiguous(type == ScalarType::Long ? tensor : torch::stable::to(tensor, ScalarType::Long));
}

// The dtype in which numbers of this tensor are summed.
inline ScalarType accumulator(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Returns a contiguous tensor, after checking that it has the dtype of sums and the given shape.
inline Tensor dense_numbers(const Tensor& tensor, const char* name, ScalarType type, const std::vector<int64_t>& shape) {
  require(tensor.scalar_type() == type, name, " is ", toString(tensor.scalar_type()), "; allowed: ", toString(type));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && tensor.size(static_cast<int64_t>(i)) == shape[i];
    wanted << (i == 0 ? "" : ", ") << shape[i];
  }
  require(same, name, " must be [", wanted.str(), "]");
  return torch::stable::contiguous(tensor);
}

// Checks an accumulator: a table [V, H] of the dtype of sums, to whose rows a kernel adds.
inline void check_accumulator(const Tensor& table, const Tensor& grad) {
  const ScalarType type = accumulator(grad);
  require(table.scalar_type() == type, "accumulator is ", toString(table.scalar_type()), "; allowed: ", toString(type));
  require(
      table.dim() == 2 && grad.dim() >= 1 && table.size(1) == grad.size(grad.dim() - 1) && table.is_contiguous(),
      "accumulator must be [V, H], contiguous, with the H of grad");
}

// Checks that logits are [N, V] and labels [N, K]. Returns the labels as `dense_integers` does.
inline Tensor check_logits(const Tensor& logits, const Tensor& labels) {
  require(logits.dim() == 2, "logits must be [N, V], not of ", logits.dim(), " dimensions");
  require(logits.size(1) >= 1, "logits must be [N, V] with V >= 1");
  require(labels.dim() == 2 && labels.size(0) == logits.size(0), "labels must be [N, K] with the N of logits, ", logits.size(0));
  return dense_integers(labels, "labels");
}

// Checks that a kernel can overwrite logits.
inline void check_in_place(const Tensor& logits) { require(logits.is_contiguous(), "logits must be contiguous to be overwritten"); }

}  // namespace megatron_patch
