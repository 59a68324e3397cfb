// Online softmax: the largest logit and the sum of exponentials of a row, kept by each thread and merged over a block in a fixed order.
#pragma once

#include "common.cuh"

// benchmarks/loss_harness.cu compares other values on a GPU.
#ifndef MP_LOSS_THREADS
#define MP_LOSS_THREADS 1024  // the most threads of a block
#endif

namespace megatron_patch::cuda {

constexpr int kMaxThreads = MP_LOSS_THREADS;
constexpr int kMinThreads = 128;
// Warps that merge the results of a block's threads: one for each scheduler of a multiprocessor, and no more than the smallest block has.
constexpr int kMergingWarps = 4;
constexpr int kMergingThreads = kMergingWarps * kWarp;
static_assert(kMergingThreads <= kMinThreads, "every block must have the merging warps");

// The largest logit so far, and the sum of exp(logit - largest). The alignment lets one instruction load or store both.
template <typename A>
struct alignas(2 * sizeof(A)) Running {
  A largest;
  A sum;
};

// The running softmax of no logits.
template <typename A>
__device__ __forceinline__ Running<A> no_logits() {
  return {kMinusInfinity<A>, A(0)};
}

// The shift of the exponentials: a finite number even where all logits so far are -inf, because -inf - -inf is NaN.
template <typename A>
__device__ __forceinline__ A shift_of(A largest) {
  return larger(largest, kLowest<A>);
}

// Adds `kCount` logits to a running softmax.
template <typename T, int kCount>
__device__ __forceinline__ void add_logits(Running<Number<T>>& running, const Number<T>* numbers) {
  using A = Number<T>;
  A largest = running.largest;
#pragma unroll
  for (int j = 0; j < kCount; ++j) largest = larger(largest, numbers[j]);
  const A shift = shift_of(largest);
  A sum = running.sum * exponential<T>(running.largest, shift);
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += exponential<T>(numbers[j], shift);
  running = {largest, sum};
}

// The sum over a warp; every lane gets the same bits.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Merges `kCount` results: first finds the largest logit of all, then adds the sums, each rescaled to it.
template <typename T, int kCount>
__device__ __forceinline__ Running<Number<T>> merge(const Running<Number<T>> (&results)[kCount]) {
  using A = Number<T>;
  A tree[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) tree[i] = results[i].largest;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) tree[i] = larger(tree[i], tree[i + half]);
  }
  const A shift = shift_of(tree[0]);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += results[i].sum * exponential<T>(results[i].largest, shift);
  return {tree[0], sum};
}

// Merges the results of a warp's lanes the same way; every lane gets the same bits.
template <typename T>
__device__ __forceinline__ Running<Number<T>> merge_lanes(Running<Number<T>> mine) {
  using A = Number<T>;
  A largest = mine.largest;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  return {largest, warp_sum(mine.sum * exponential<T>(mine.largest, shift_of(largest)))};
}

// Shared memory of a block's merge: the result of each thread, and the merged share of each merging warp.
template <typename A>
struct alignas(16) Results {
  Running<A> threads[kMaxThreads];
  Running<A> warps[kMergingWarps];
};

// Merges one thread's share of the block's results. In a full block the thread loads all of them before it uses the first: of every
// 2 * kMergingThreads results two neighbors, 16 bytes. Smaller blocks load one result at a time; so does double, which needs too many
// registers.
template <typename T>
__device__ __forceinline__ Running<Number<T>> merge_share(const Running<Number<T>>* results, unsigned thread) {
  using A = Number<T>;
  if constexpr (sizeof(T) < 8 && kMaxThreads >= 2 * kMergingThreads) {
    if (blockDim.x == kMaxThreads) {
      constexpr int share = kMaxThreads / kMergingThreads;
      Running<A> mine[share];
#pragma unroll
      for (int i = 0; i < share; ++i) mine[i] = results[i / 2 * (2 * kMergingThreads) + 2 * thread + i % 2];
      return merge<T, share>(mine);
    }
  }
  Running<A> mine = results[thread];
#pragma unroll 1
  for (unsigned i = kMergingThreads; i < blockDim.x; i += kMergingThreads) {
    const Running<A> both[2] = {mine, results[i + thread]};
    mine = merge<T, 2>(both);
  }
  return mine;
}

// Calls `use`, in the first warp only, with the block's largest logit and sum. Every thread must have stored its own result before. The
// order of the merge depends on the block's size alone, so that results are reproducible. Only the merging warps take part: if all warps
// shuffled, the merge would take more than twice as many instructions. Each warp stores and loads contiguous memory, so that a transaction
// of 128 bytes touches every bank of shared memory once.
template <typename T, typename Use>
__device__ __forceinline__ void merge_block(Results<Number<T>>& results, const Use& use) {
  const unsigned thread = threadIdx.x;
  __syncthreads();
  if (thread < kMergingThreads) {
    const auto mine = merge_lanes<T>(merge_share<T>(results.threads, thread));
    if (thread % kWarp == 0) results.warps[thread / kWarp] = mine;
    sync_first<kMergingThreads>();
    if (thread < kWarp) {
      Running<Number<T>> all[kMergingWarps];
#pragma unroll
      for (int i = 0; i < kMergingWarps; ++i) all[i] = results.warps[i];
      use(merge<T, kMergingWarps>(all));
    }
  }
}

}  // namespace megatron_patch::cuda
