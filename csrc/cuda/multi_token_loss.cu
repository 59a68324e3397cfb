// Multi-token loss: a block owns a row of logits. One pass finds the largest logit and the sum of exponentials together; the part of the row
// that fits stays in shared memory, so that loss and gradient in one go read most of the logits once and write them once.
#include "common.cuh"

namespace megatron_patch::cuda {
namespace {

template <typename A>
struct Running {
  A largest;
  A sum;
};

// What a shifted exponential is shifted by: nothing while only -inf was seen, since -inf - -inf is no number.
template <typename A>
__device__ __forceinline__ A shift_of(A largest) {
  return largest == kMinusInfinity<A> ? A(0) : largest;
}

template <typename T>
__device__ __forceinline__ Running<Number<T>> merge(Running<Number<T>> one, Running<Number<T>> other) {
  using A = Number<T>;
  const A largest = one.largest > other.largest ? one.largest : other.largest, shift = shift_of(largest);
  return {largest, one.sum * exponential<T>(one.largest, shift) + other.sum * exponential<T>(other.largest, shift)};
}

// Takes `count` more logits in.
template <typename T, int kCount>
__device__ __forceinline__ void take(Running<Number<T>>& running, const T* values) {
  using A = Number<T>;
  A largest = running.largest;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const A value = widen(values[j]);
    largest = value > largest ? value : largest;
  }
  const A shift = shift_of(largest);
  A sum = running.sum * exponential<T>(running.largest, shift);
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += exponential<T>(widen(values[j]), shift);
  running = {largest, sum};
}

// The whole block's largest logit and sum, in a fixed order. `scratch` holds kMostWarps and serves once.
template <typename T>
__device__ __forceinline__ Running<Number<T>> block_running(Running<Number<T>> mine, Running<Number<T>>* scratch) {
  using A = Number<T>;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Running<A> other = {__shfl_xor_sync(0xffffffffu, mine.largest, offset), __shfl_xor_sync(0xffffffffu, mine.sum, offset)};
    // The lower lane's part first, so that all lanes get the same bits.
    const bool lower = (static_cast<int>(threadIdx.x) & offset) == 0;
    mine = lower ? merge<T>(mine, other) : merge<T>(other, mine);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane == 0) scratch[warp] = mine;
  __syncthreads();
  Running<A> total = scratch[0];
  for (int other = 1; other < warps; ++other) total = merge<T>(total, scratch[other]);
  return total;
}

// Reads a row once; the first `kept` vectors behind its head also go to shared memory.
template <typename T>
__device__ __forceinline__ Running<Number<T>> read_row(const T* row, int64_t vocab, RowCut cut, Wide<T>* cache, int64_t kept) {
  using A = Number<T>;
  Running<A> running = {kMinusInfinity<A>, A(0)};
  const int64_t threads = blockDim.x, thread = threadIdx.x;
  for (int64_t v = thread; v < cut.head; v += threads) take<T, 1>(running, row + v);
  for (int64_t i = thread; i < cut.vectors; i += threads) {
    const Wide<T> vector = load_vector<kVectorWidth<T>>(row + cut.head + i * kVectorWidth<T>);
    if (i < kept) cache[i] = vector;
    take<T, kVectorWidth<T>>(running, vector.values);
  }
  for (int64_t v = cut.head + cut.vectors * kVectorWidth<T> + thread; v < vocab; v += threads) take<T, 1>(running, row + v);
  return running;
}

// out = exp(row - largest) * factor.
template <typename T>
__device__ __forceinline__ void write_gradient(
    const T* row, T* out, int64_t vocab, RowCut cut, const Wide<T>* cache, int64_t kept, Number<T> largest, Number<T> factor) {
  const int64_t threads = blockDim.x, thread = threadIdx.x;
  const auto gradient = [&](T value) { return narrow<T>(exponential<T>(widen(value), largest) * factor); };
  for (int64_t v = thread; v < cut.head; v += threads) out[v] = gradient(row[v]);
  for (int64_t i = thread; i < cut.vectors; i += threads) {
    const int64_t v = cut.head + i * kVectorWidth<T>;
    Wide<T> vector = i < kept ? cache[i] : load_vector<kVectorWidth<T>>(row + v);
#pragma unroll
    for (int j = 0; j < kVectorWidth<T>; ++j) vector.values[j] = gradient(vector.values[j]);
    store_vector<kVectorWidth<T>>(out + v, vector);
  }
  for (int64_t v = cut.head + cut.vectors * kVectorWidth<T> + thread; v < vocab; v += threads) out[v] = gradient(row[v]);
}

// A row's label: its column here, or -1 where it is ignored or of another shard.
struct Label {
  int64_t column;
  bool scored;
};

__device__ __forceinline__ Label label_at(const int64_t* labels, int64_t k, int64_t vocab_start, int64_t vocab) {
  const int64_t label = labels[k];
  const bool scored = label != kIgnoreIndex;
  return {scored && label >= vocab_start && label - vocab_start < vocab ? label - vocab_start : -1, scored};
}

__device__ __forceinline__ void check_label(const int64_t* labels, int64_t k, Label label, int64_t row, int64_t vocab) {
  if (label.scored && label.column < 0) {
    MP_TRAP(
        "megatron_patch: labels hold %lld in row %lld; allowed: 0 to %lld, and -100 for those that are not scored\n",
        static_cast<long long>(labels[k]), static_cast<long long>(row), static_cast<long long>(vocab - 1));
  }
}

// What the labels in column `column` take from it together; nothing unless k is the first of them.
template <typename A, typename Weight>
__device__ __forceinline__ A taken_from(
    const int64_t* labels, int64_t k, int64_t num_labels, int64_t vocab_start, int64_t vocab, int64_t column, const Weight& weight, bool* first) {
  A taken = 0;
  *first = true;
  for (int64_t other = 0; other < num_labels; ++other) {
    if (label_at(labels, other, vocab_start, vocab).column != column) continue;
    if (other < k) *first = false;
    taken += weight(other);
  }
  return taken;
}

template <typename T>
__global__ void __launch_bounds__(1024) statistics_kernel(
    const T* __restrict__ logits, int64_t stride, const int64_t* __restrict__ labels, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, bool check, Number<T>* __restrict__ out) {
  using A = Number<T>;
  __shared__ Running<A> scratch[kMostWarps];
  const int64_t row = blockIdx.x;
  const T* source = logits + row * stride;
  const RowCut cut = cut_row(source, vocab);
  const Running<A> whole = block_running<T>(read_row<T>(source, vocab, cut, nullptr, 0), scratch);
  A* target = out + row * (2 + num_labels);
  if (threadIdx.x == 0) {
    target[0] = whole.largest;
    target[1] = whole.sum;
  }
  for (int64_t k = threadIdx.x; k < num_labels; k += blockDim.x) {
    const Label label = label_at(labels + row * num_labels, k, vocab_start, vocab);
    if (check) check_label(labels + row * num_labels, k, label, row, vocab);
    target[2 + k] = label.column < 0 ? A(0) : widen(source[label.column]);
  }
}

template <typename T>
__global__ void __launch_bounds__(1024) gradient_kernel(
    const T* logits, int64_t stride, const int64_t* __restrict__ labels, int64_t num_labels, int64_t vocab_start, int64_t vocab,
    const Number<T>* __restrict__ normalizer, const Number<T>* __restrict__ grad_nll, const Number<T>* __restrict__ grad_lse, T* out,
    int64_t out_stride) {
  using A = Number<T>;
  __shared__ A scratch[kMostWarps];
  const int64_t row = blockIdx.x;
  const T* source = logits + row * stride;
  T* target = out + row * out_stride;
  const int64_t* mine = labels + row * num_labels;
  const A* weights = grad_nll + row * num_labels;
  const A largest = normalizer[2 * row];
  const auto k = static_cast<int64_t>(threadIdx.x);
  const Label label = k < num_labels ? label_at(mine, k, vocab_start, vocab) : Label{-1, false};
  const A factor = (block_sum<A>(label.scored ? weights[k] : A(0), scratch) + grad_lse[row]) / normalizer[2 * row + 1];
  A at_label = 0;
  bool first = false;
  if (label.column >= 0) {
    const A taken = taken_from<A>(mine, k, num_labels, vocab_start, vocab, label.column, [&](int64_t other) { return weights[other]; }, &first);
    at_label = exponential<T>(widen(source[label.column]), largest) * factor - taken;
  }
  __syncthreads();  // labels' logits are read before anything is overwritten
  RowCut cut = cut_row(source, vocab);
  // Vectors need the same alignment on both sides.
  if ((reinterpret_cast<uintptr_t>(source) - reinterpret_cast<uintptr_t>(target)) % 16 != 0) cut = {vocab, 0};
  write_gradient<T>(source, target, vocab, cut, nullptr, 0, largest, factor);
  __syncthreads();
  if (first) target[label.column] = narrow<T>(at_label);
}

template <typename T>
__global__ void __launch_bounds__(1024) loss_and_gradient_kernel(
    T* logits, int64_t stride, const int64_t* __restrict__ labels, int64_t num_labels, int64_t vocab, const Number<T>* __restrict__ weights,
    Number<T> z_loss, int64_t cache_vectors, Number<T>* __restrict__ loss) {
  using A = Number<T>;
  MP_DYNAMIC_SHARED(cache_bytes);
  __shared__ Running<A> running_scratch[kMostWarps];
  __shared__ A scratch[kMostWarps];
  auto* cache = reinterpret_cast<Wide<T>*>(cache_bytes);
  const int64_t row = blockIdx.x;
  T* target = logits + row * stride;
  const int64_t* mine = labels + row * num_labels;
  const RowCut cut = cut_row(target, vocab);
  const int64_t kept = cache_vectors < cut.vectors ? cache_vectors : cut.vectors;
  const Running<A> whole = block_running<T>(read_row<T>(target, vocab, cut, cache, kept), running_scratch);

  const auto weight = [&](int64_t k) { return weights == nullptr ? A(1) : weights[k]; };
  const auto k = static_cast<int64_t>(threadIdx.x);
  const Label label = k < num_labels ? label_at(mine, k, 0, vocab) : Label{-1, false};
  if (k < num_labels) check_label(mine, k, label, row, vocab);
  const bool scored = label.column >= 0;
  const A logit = scored ? widen(target[label.column]) : A(0);
  const A total_weight = block_sum<A>(scored ? weight(k) : A(0), scratch);
  const A below = block_sum<A>(scored ? weight(k) * (whole.largest - logit) : A(0), scratch);
  const A log_sum = logarithm(whole.sum), lse = whole.largest + log_sum;
  const A factor = total_weight == A(0) ? A(0) : total_weight * (A(1) + A(2) * z_loss * lse) / whole.sum;
  if (threadIdx.x == 0) loss[row] = total_weight == A(0) ? A(0) : below + total_weight * (log_sum + z_loss * lse * lse);
  A at_label = 0;
  bool first = false;
  if (scored) {
    const A taken = taken_from<A>(mine, k, num_labels, 0, vocab, label.column, weight, &first);
    at_label = exponential<T>(logit, whole.largest) * factor - taken;
  }
  // Nothing to wait for: every label's logit was read before the sums above.
  write_gradient<T>(target, target, vocab, cut, cache, kept, whole.largest, factor);
  __syncthreads();
  if (first) target[label.column] = narrow<T>(at_label);
}

// Threads for a row: enough that each has some vectors, and one for each label.
int threads_for(int64_t vocab, int64_t num_labels, int width) {
  const int64_t wanted = vocab / (4 * static_cast<int64_t>(width)) > num_labels ? vocab / (4 * static_cast<int64_t>(width)) : num_labels;
  int threads = 128;
  while (threads < 1024 && threads < wanted) threads *= 2;
  return threads;
}

}  // namespace

cudaError_t mp_loss_statistics(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, bool check, void* out, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  if (!fits_grid(num_rows)) return cudaErrorInvalidConfiguration;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto kernel = statistics_kernel<T>;
    MP_LAUNCH(
        kernel, dim3(static_cast<unsigned>(num_rows)), dim3(threads_for(vocab, num_labels, kVectorWidth<T>)), 0, stream,
        static_cast<const T*>(logits), stride, labels, num_labels, vocab_start, vocab, check, static_cast<Number<T>*>(out));
    return cudaGetLastError();
  });
}

cudaError_t mp_loss_gradient(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, const void* normalizer, const void* grad_nll, const void* grad_lse, void* out, int64_t out_stride, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  if (!fits_grid(num_rows)) return cudaErrorInvalidConfiguration;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Number<T>;
    const auto kernel = gradient_kernel<T>;
    MP_LAUNCH(
        kernel, dim3(static_cast<unsigned>(num_rows)), dim3(threads_for(vocab, num_labels, kVectorWidth<T>)), 0, stream,
        static_cast<const T*>(logits), stride, labels, num_labels, vocab_start, vocab, static_cast<const A*>(normalizer),
        static_cast<const A*>(grad_nll), static_cast<const A*>(grad_lse), static_cast<T*>(out), out_stride);
    return cudaGetLastError();
  });
}

cudaError_t mp_loss_and_gradient(
    NumberType type, void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab,
    const void* weights, double z_loss, void* loss, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  if (!fits_grid(num_rows)) return cudaErrorInvalidConfiguration;
  int limit = 0;
  const cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Number<T>;
    const auto kernel = loss_and_gradient_kernel<T>;
    // Half of what there is, so that two blocks share a processor: one reads while the other writes. 1 kB is for the reductions.
    const int64_t room = (limit / 2 - 1024) / 16;
    const int64_t vectors = vocab / kVectorWidth<T> < room ? vocab / kVectorWidth<T> : room;
    const auto bytes = static_cast<int>(vectors * 16);
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (refused != cudaSuccess) return refused;
    MP_LAUNCH(
        kernel, dim3(static_cast<unsigned>(num_rows)), dim3(threads_for(vocab, num_labels, kVectorWidth<T>)), bytes, stream,
        static_cast<T*>(logits), stride, labels, num_labels, vocab, static_cast<const A*>(weights), static_cast<A>(z_loss), vectors,
        static_cast<A*>(loss));
    return cudaGetLastError();
  });
}

}  // namespace megatron_patch::cuda
