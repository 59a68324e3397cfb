#include "patch_embedding.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace megatron_patch {

template <typename T>
void patch_embedding_forward(const T* weight, const PatchIds& patches, int64_t hidden, T* out, int64_t begin, int64_t end) {
  std::vector<float> sum(hidden);
  const float scale = 1.0f / static_cast<float>(patches.patch_size);
  for (int64_t patch = begin; patch < end; ++patch) {
    const int64_t* ids = patches.ids + patch * patches.patch_size;
    bool empty = true;
    for (int64_t k = 0; k < patches.patch_size; ++k) {
      const int64_t row = ids[k] - patches.first_row;
      if (row < 0 || row >= patches.num_rows) continue;
      const T* source = weight + row * hidden;
      if (empty) {
        for (int64_t h = 0; h < hidden; ++h) sum[h] = static_cast<float>(source[h]);
      } else {
        for (int64_t h = 0; h < hidden; ++h) sum[h] += static_cast<float>(source[h]);
      }
      empty = false;
    }
    T* target = out + patch * hidden;
    if (empty) {
      for (int64_t h = 0; h < hidden; ++h) target[h] = static_cast<T>(0.0f);
    } else {
      for (int64_t h = 0; h < hidden; ++h) target[h] = static_cast<T>(sum[h] * scale);
    }
  }
}

RowOccurrences find_occurrences(const PatchIds& patches) {
  RowOccurrences rows;
  rows.offsets.assign(patches.num_rows + 1, 0);
  const int64_t total = patches.num_patches * patches.patch_size;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t row = patches.ids[i] - patches.first_row;
    if (row >= 0 && row < patches.num_rows) ++rows.offsets[row + 1];
  }
  for (int64_t row = 0; row < patches.num_rows; ++row) rows.offsets[row + 1] += rows.offsets[row];
  rows.patches.resize(rows.offsets[patches.num_rows]);
  std::vector<int64_t> next(rows.offsets.begin(), rows.offsets.end() - 1);
  for (int64_t i = 0; i < total; ++i) {
    const int64_t row = patches.ids[i] - patches.first_row;
    if (row >= 0 && row < patches.num_rows) rows.patches[next[row]++] = i / patches.patch_size;
  }
  return rows;
}

template <typename T>
void patch_embedding_backward(
    const T* grad_out, const RowOccurrences& rows, int64_t patch_size, int64_t hidden, T* grad_weight, int64_t begin, int64_t end) {
  std::vector<float> sum(hidden);
  const float scale = 1.0f / static_cast<float>(patch_size);
  for (int64_t row = begin; row < end; ++row) {
    T* target = grad_weight + row * hidden;
    for (int64_t h = 0; h < hidden; ++h) sum[h] = 0.0f;
    for (int64_t i = rows.offsets[row]; i < rows.offsets[row + 1]; ++i) {
      const T* source = grad_out + rows.patches[i] * hidden;
      for (int64_t h = 0; h < hidden; ++h) sum[h] += static_cast<float>(source[h]);
    }
    for (int64_t h = 0; h < hidden; ++h) target[h] = static_cast<T>(sum[h] * scale);
  }
}

#define INSTANTIATE(T)                                                                                           \
  template void patch_embedding_forward<T>(const T*, const PatchIds&, int64_t, T*, int64_t, int64_t);            \
  template void patch_embedding_backward<T>(const T*, const RowOccurrences&, int64_t, int64_t, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace megatron_patch
