// Patch embedding on the CPU: the mean of K rows of a table, forward and backward.
// In: a table (or a shard of it) and the ids of patches. Out: one mean for each patch; one gradient for each row.
// Sums are computed in float (double for double), in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace megatron_patch {

// Ids of patches [num_patches, patch_size]. The table holds the ids [first_row, first_row + num_rows); other ids add nothing.
struct PatchIds {
  const int64_t* ids;
  int64_t num_patches;
  int64_t patch_size;
  int64_t first_row;
  int64_t num_rows;

  int64_t count() const { return num_patches * patch_size; }
  // The row of an id in the table, or -1.
  int64_t row(int64_t id) const { return id >= first_row && id - first_row < num_rows ? id - first_row : -1; }
};

// The smallest and the largest id; there must be at least one.
std::pair<int64_t, int64_t> id_range(const PatchIds& patches);

// out[p, :] = 1/K sum over k of weight[row(ids[p, k]), :], for p in [begin, end).
template <typename T>
void patch_embedding_forward(const T* weight, const PatchIds& patches, int64_t hidden, T* out, int64_t begin, int64_t end);

// The patches that contain each row: patches[offsets[row]] to patches[offsets[row + 1] - 1], in order, once for each occurrence.
struct RowOccurrences {
  std::vector<int64_t> offsets;
  std::vector<int64_t> patches;

  // The amount of work: one for each row that is written, and one for each occurrence that is added.
  int64_t work() const { return static_cast<int64_t>(offsets.size() + patches.size()) - 1; }
};
RowOccurrences find_occurrences(const PatchIds& patches);

// grad_weight[row, :] = 1/K sum over the row's occurrences, in order, of grad_out[patch, :], for the rows whose work starts in
// [begin, end) of [0, occurrences.work()). Each row is written by one thread, and the threads get even shares of the work.
template <typename T>
void patch_embedding_backward_rows(
    const T* grad_out, const RowOccurrences& occurrences, int64_t patch_size, int64_t hidden, T* grad_weight, int64_t begin, int64_t end);

// The type in which numbers of type T are summed.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Adds what patch_embedding_backward_rows computes to the accumulator; rows without an occurrence are neither read nor written.
template <typename T>
void patch_embedding_backward_add_rows(
    const T* grad_out, const RowOccurrences& occurrences, int64_t patch_size, int64_t hidden, Accumulator<T>* accumulator, int64_t begin,
    int64_t end);

}  // namespace megatron_patch
