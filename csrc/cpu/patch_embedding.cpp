#include "patch_embedding.h"

#include <algorithm>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace megatron_patch {
namespace {

// Starts or continues a sum of rows. One sum fits the first-level cache while the rows are streamed.
template <typename T>
void add_row(const T* __restrict source, int64_t hidden, bool first, Accumulator<T>* __restrict sum) {
  if (first) {
    for (int64_t h = 0; h < hidden; ++h) sum[h] = static_cast<Accumulator<T>>(source[h]);
  } else {
    for (int64_t h = 0; h < hidden; ++h) sum[h] += static_cast<Accumulator<T>>(source[h]);
  }
}

// Divides by K instead of multiplying with 1/K: so the mean is rounded once, and the mean of K equal rows is that row.
template <typename T>
void write_mean(const Accumulator<T>* __restrict sum, int64_t patch_size, int64_t hidden, T* __restrict target) {
  const auto divisor = static_cast<Accumulator<T>>(patch_size);
  for (int64_t h = 0; h < hidden; ++h) target[h] = static_cast<T>(sum[h] / divisor);
}

// Calls `write(row, sum)` for the rows whose work starts in [begin, end). `sum` adds a row's occurrences in order; nullptr: there are none.
template <typename T, typename Write>
void sum_rows(const T* grad_out, const RowOccurrences& occurrences, int64_t hidden, int64_t begin, int64_t end, const Write& write) {
  const auto& offsets = occurrences.offsets;
  const auto num_rows = static_cast<int64_t>(offsets.size()) - 1;
  // The first row whose work starts at or after `work`, by bisection, since row + offsets[row] grows with row.
  const auto row_at = [&](int64_t work) {
    int64_t low = 0, high = num_rows;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (middle + offsets[middle] < work) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  std::vector<Accumulator<T>> sum(hidden);
  for (int64_t row = row_at(begin), last = row_at(end); row < last; ++row) {
    if (offsets[row] == offsets[row + 1]) {
      write(row, static_cast<const Accumulator<T>*>(nullptr));
      continue;
    }
    // Starts from zero as torch's dense gradient does, so that -0 becomes +0 in both.
    std::fill(sum.begin(), sum.end(), Accumulator<T>(0));
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
      add_row(grad_out + occurrences.patches[i] * hidden, hidden, false, sum.data());
    }
    write(row, static_cast<const Accumulator<T>*>(sum.data()));
  }
}

}  // namespace

std::pair<int64_t, int64_t> id_range(const PatchIds& patches) {
  const auto [lowest, highest] = std::minmax_element(patches.ids, patches.ids + patches.count());
  return {*lowest, *highest};
}

template <typename T>
void patch_embedding_forward(const T* weight, const PatchIds& patches, int64_t hidden, T* out, int64_t begin, int64_t end) {
  std::vector<Accumulator<T>> sum(hidden);
  for (int64_t patch = begin; patch < end; ++patch) {
    bool first = true;
    for (int64_t k = 0; k < patches.patch_size; ++k) {
      const int64_t row = patches.row(patches.ids[patch * patches.patch_size + k]);
      if (row < 0) continue;
      add_row(weight + row * hidden, hidden, first, sum.data());
      first = false;
    }
    if (first) std::fill(sum.begin(), sum.end(), Accumulator<T>(0));
    write_mean(sum.data(), patches.patch_size, hidden, out + patch * hidden);
  }
}

RowOccurrences find_occurrences(const PatchIds& patches) {
  RowOccurrences found;
  found.offsets.assign(patches.num_rows + 1, 0);
  for (int64_t i = 0; i < patches.count(); ++i) {
    const int64_t row = patches.row(patches.ids[i]);
    if (row >= 0) ++found.offsets[row + 1];
  }
  for (int64_t row = 0; row < patches.num_rows; ++row) found.offsets[row + 1] += found.offsets[row];
  found.patches.resize(found.offsets.back());
  std::vector<int64_t> next(found.offsets.begin(), found.offsets.end() - 1);
  for (int64_t i = 0; i < patches.count(); ++i) {
    const int64_t row = patches.row(patches.ids[i]);
    if (row >= 0) found.patches[next[row]++] = i / patches.patch_size;
  }
  return found;
}

template <typename T>
void patch_embedding_backward_rows(
    const T* grad_out, const RowOccurrences& occurrences, int64_t patch_size, int64_t hidden, T* grad_weight, int64_t begin, int64_t end) {
  sum_rows(grad_out, occurrences, hidden, begin, end, [&](int64_t row, const Accumulator<T>* sum) {
    T* target = grad_weight + row * hidden;
    if (sum == nullptr) std::memset(static_cast<void*>(target), 0, hidden * sizeof(T));
    else write_mean(sum, patch_size, hidden, target);
  });
}

template <typename T>
void patch_embedding_backward_add_rows(
    const T* grad_out, const RowOccurrences& occurrences, int64_t patch_size, int64_t hidden, Accumulator<T>* accumulator, int64_t begin,
    int64_t end) {
  const auto divisor = static_cast<Accumulator<T>>(patch_size);
  sum_rows(grad_out, occurrences, hidden, begin, end, [&](int64_t row, const Accumulator<T>* sum) {
    if (sum == nullptr) return;
    Accumulator<T>* target = accumulator + row * hidden;
    for (int64_t h = 0; h < hidden; ++h) target[h] += sum[h] / divisor;
  });
}

#define INSTANTIATE(T)                                                                                                              \
  template void patch_embedding_forward<T>(const T*, const PatchIds&, int64_t, T*, int64_t, int64_t);                               \
  template void patch_embedding_backward_rows<T>(const T*, const RowOccurrences&, int64_t, int64_t, T*, int64_t, int64_t);          \
  template void patch_embedding_backward_add_rows<T>(                                                                               \
      const T*, const RowOccurrences&, int64_t, int64_t, Accumulator<T>*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace megatron_patch
