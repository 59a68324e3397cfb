// What the CUDA kernels' launchers take: raw pointers, a code for the number type, a stream. No torch here: the .cu files compile in
// seconds, and the very same files run on a CPU in the tests (tests/cuda_on_cpu).
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace megatron_patch::cuda {

enum class NumberType : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };

constexpr int64_t kIgnoreIndex = -100;
// More labels a row than this are refused: each has a thread of its own.
constexpr int64_t kMaxLabels = 1024;
// Sorted occurrences that one block sums in order; longer runs of one id are put together from tiles.
constexpr int64_t kTile = 64;
// Rows of an embedding's table (or shard) on a GPU: the backward pass sorts them as int32.
constexpr int64_t kMaxRows = 2147483647;

extern "C" {

// out[p, :] = 1/K sum over k of weight[ids[p, k] - first_row, :]; ids of other shards add nothing. With `check`, an id outside the table
// is printed and ends the kernel.
cudaError_t mp_patch_embedding_forward(
    NumberType type, const void* weight, const int64_t* ids, int64_t num_patches, int64_t patch_size, int64_t hidden, int64_t first_row,
    int64_t num_rows, bool check, void* out, cudaStream_t stream);

// rows[i] = ids[i] - first_row where that is one of num_rows; -1 where the id is smaller than those, num_rows where it is larger. At most
// kMaxRows.
cudaError_t mp_patch_embedding_rows(
    const int64_t* ids, int64_t count, int64_t first_row, int64_t num_rows, int32_t* rows, cudaStream_t stream);

// target[row, :] = 1/K sum, in order, of grad[order[i] / K, :] over the i with sorted_rows[i] == row, where `accumulate` is false and the
// target is of the gradient's type; with `accumulate` that is added to target[row, :], of the accumulator's type. Rows without any are
// neither read nor written. `sorted_rows` are those of mp_patch_embedding_rows, sorted, and `order` where each came from. `partial` is room
// for [tiles, 2, hidden] sums, tiles = ceil(count / kTile).
cudaError_t mp_patch_embedding_backward(
    NumberType type, const void* grad, const int32_t* sorted_rows, const int64_t* order, int64_t count, int64_t patch_size, int64_t hidden,
    int64_t num_rows, void* partial, void* target, bool accumulate, cudaStream_t stream);

// The three of csrc/cpu/multi_token_loss.h, over all rows; statistics, normalizers, losses and weights are float (double for kDouble).
// `stride` is the distance of rows of logits in elements; what is written is contiguous, or in place.
cudaError_t mp_loss_statistics(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, bool check, void* out, cudaStream_t stream);

cudaError_t mp_loss_gradient(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, const void* normalizer, const void* grad_nll, const void* grad_lse, void* out, int64_t out_stride, cudaStream_t stream);

cudaError_t mp_loss_and_gradient(
    NumberType type, void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab,
    const void* weights, double z_loss, void* loss, cudaStream_t stream);

}  // extern "C"

}  // namespace megatron_patch::cuda
