// The launchers of the CUDA kernels: they take raw pointers, a code for the number type, and a stream. Without torch's headers the .cu
// files compile in seconds, and the tests can run the same files on a CPU (tests/cuda_on_cpu).
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace megatron_patch::cuda {

enum class NumberType : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };

constexpr int64_t kIgnoreIndex = -100;
// The most labels of a row; each label has its own thread.
constexpr int64_t kMaxLabels = 1024;
// Sorted occurrences that one block sums in order; the sum of a longer run of one id is put together from several tiles.
constexpr int64_t kTile = 64;
// The most rows of an embedding table (or of a shard) on a GPU, because the backward pass sorts them as int32.
constexpr int64_t kMaxRows = 2147483647;

extern "C" {

// out[p, :] = 1/K sum over k of weight[ids[p, k] - first_row, :]; ids of other shards add nothing. With `check`, the kernel prints an id
// outside of the table and traps.
cudaError_t mp_patch_embedding_forward(
    NumberType type, const void* weight, const int64_t* ids, int64_t num_patches, int64_t patch_size, int64_t hidden, int64_t first_row,
    int64_t num_rows, bool check, void* out, cudaStream_t stream);

// rows[i] = ids[i] - first_row where this is in [0, num_rows), -1 where the id is smaller, num_rows where it is larger. num_rows is at most
// kMaxRows.
cudaError_t mp_patch_embedding_rows(
    const int64_t* ids, int64_t count, int64_t first_row, int64_t num_rows, int32_t* rows, cudaStream_t stream);

// sum[row, :] = 1/K sum, in order, of grad[order[i] / K, :] over all i with sorted_rows[i] == row. Without `accumulate`, target[row, :] is
// set to it and has the gradient's type; with `accumulate`, it is added to target[row, :], which has the type of sums. Rows without
// occurrences are neither read nor written. `sorted_rows` are the rows of mp_patch_embedding_rows, sorted, and `order` their indices before
// the sort. `partial` is scratch memory for [tiles, 2, hidden] sums, tiles = ceil(count / kTile).
cudaError_t mp_patch_embedding_backward(
    NumberType type, const void* grad, const int32_t* sorted_rows, const int64_t* order, int64_t count, int64_t patch_size, int64_t hidden,
    int64_t num_rows, void* partial, void* target, bool accumulate, cudaStream_t stream);

// The three functions of csrc/cpu/multi_token_loss.h, over all rows. Statistics, normalizers, losses and weights are float (double for
// kDouble). `stride` is the distance between rows of logits in elements; outputs are contiguous, or in place.
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
