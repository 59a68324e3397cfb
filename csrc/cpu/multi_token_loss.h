// Multi-token loss on the CPU: one pass over each row of logits, for any number of labels.
// In: rows of logits (or of a vocabulary shard of them) and K labels for each row. Out: the row's statistics, or its gradient.
// Computed in float (double for double), in a fixed number of lanes, so that neither the number of threads nor the vector width of the
// machine changes a bit.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace megatron_patch {

constexpr int64_t kIgnoreIndex = -100;

template <typename T>
using LossNumber = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Labels [num_rows, num_labels] of logits [num_rows, vocab]; column 0 of the logits is the token id `vocab_start`.
struct LabelTable {
  const int64_t* labels;
  int64_t num_rows;
  int64_t num_labels;
  int64_t vocab_start;
  int64_t vocab;

  int64_t count() const { return num_rows * num_labels; }
  // The column of a label, or -1 where it is ignored or belongs to another shard.
  int64_t column(int64_t row, int64_t k) const {
    const int64_t label = labels[row * num_labels + k];
    return label != kIgnoreIndex && label >= vocab_start && label - vocab_start < vocab ? label - vocab_start : -1;
  }
};

// The smallest and the largest label that is not ignored; {0, -1} where all are ignored.
std::pair<int64_t, int64_t> label_range(const LabelTable& table);

// For rows [begin, end): out[row] = (largest logit, sum of exp(logit - largest), the logit of each label, or 0 where it has no column).
template <typename T>
void loss_statistics(const T* logits, const LabelTable& table, LossNumber<T>* out, int64_t begin, int64_t end);

// For rows [begin, end), with p = exp(logit - max) / sum from normalizer[row] = (max, sum) over all shards:
// out[row, v] = (sum over k of grad_nll[row, k] + grad_lse[row]) p_v - sum over the labels k in column v of grad_nll[row, k].
// `out` can be `logits`.
template <typename T>
void loss_gradient(
    const T* logits, const LabelTable& table, const LossNumber<T>* normalizer, const LossNumber<T>* grad_nll,
    const LossNumber<T>* grad_lse, T* out, int64_t begin, int64_t end);

// For rows [begin, end), computes the loss and overwrites the logits with its gradient (weights: [num_labels], or null for 1):
// loss[row] = sum over scored k of weights[k] (lse - logit of k + z_loss lse^2).
template <typename T>
void loss_and_gradient(
    T* logits, const LabelTable& table, const LossNumber<T>* weights, LossNumber<T> z_loss, LossNumber<T>* loss, int64_t begin,
    int64_t end);

}  // namespace megatron_patch
