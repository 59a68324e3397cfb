// Patch embedding on the CPU: the mean of K rows, forward and backward, over raw pointers.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_patch {

// Ids of patches [num_patches, patch_size]; only rows [first_row, first_row + num_rows) of the vocabulary are here, ids outside add nothing.
struct PatchIds {
  const int64_t* ids;
  int64_t num_patches;
  int64_t patch_size;
  int64_t first_row;
  int64_t num_rows;
};

// out[p, :] = mean over k of weight[ids[p, k] - first_row, :], for p in [begin, end); summed in float.
template <typename T>
void patch_embedding_forward(const T* weight, const PatchIds& patches, int64_t hidden, T* out, int64_t begin, int64_t end);

// Where each row occurs: occurrences[offsets[row] .. offsets[row + 1]) are the patches that hold it, in order, repeated where a patch repeats it.
struct RowOccurrences {
  std::vector<int64_t> offsets;
  std::vector<int64_t> patches;
};
RowOccurrences find_occurrences(const PatchIds& patches);

// grad_weight[row, :] = sum over the row's occurrences, in order, of grad_out[patch, :] / K, for rows in [begin, end); summed in float. The order
// does not depend on threads, so neither do the bits.
template <typename T>
void patch_embedding_backward(
    const T* grad_out, const RowOccurrences& rows, int64_t patch_size, int64_t hidden, T* grad_weight, int64_t begin, int64_t end);

}  // namespace megatron_patch
