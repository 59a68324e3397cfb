// Multi-token loss. Each block processes one row of logits. A single pass finds the largest logit and the sum of exponentials (online
// softmax, running_softmax.cuh). The part of the row that fits stays in shared memory, so that the kernel for loss and gradient reads most
// logits once and writes them once. Where a row is too long for that and the GPU has clusters, the blocks of a cluster share the row.
#include <atomic>

#include "common.cuh"
#include "running_softmax.cuh"

// benchmarks/loss_harness.cu compares other values on a GPU; these are the ones in use.
#ifndef MP_LOSS_AHEAD
#define MP_LOSS_AHEAD 2  // 16-byte loads that a thread has in flight
#endif
#ifndef MP_LOSS_RESIDENCE
#define MP_LOSS_RESIDENCE kBySize  // where a row stays between its two passes
#endif

namespace megatron_patch::cuda {
namespace {

// Two blocks share a multiprocessor, so that one reads while the other writes; double needs too many registers for that.
template <typename T>
constexpr int kBlocksAProcessor = sizeof(T) == 8 ? 1 : 2;
// 16-byte vectors that a thread loads before it uses the first; exp() of double leaves registers for only one.
template <typename T>
constexpr int kAhead = sizeof(T) == 8 ? 1 : MP_LOSS_AHEAD;
// The largest cluster that every GPU with clusters supports.
constexpr int kMaxParts = 8;
// Columns are counted in 32 bits, with room for one more iteration of every loop.
constexpr int64_t kMaxColumns = std::numeric_limits<int32_t>::max() - 16 * kMaxThreads;

// Reads `kVectors` vectors at distances of `step`, all of them before the first is used. With kKeep they are also copied to shared memory.
template <typename T, int kVectors, bool kKeep>
__device__ __forceinline__ void read_vectors(Running<Number<T>>& running, const T* source, int i, int step, Wide<T>* cache) {
  constexpr int width = kVectorWidth<T>;
  Wide<T> vectors[kVectors];
#pragma unroll
  for (int a = 0; a < kVectors; ++a) vectors[a] = load_vector<width>(source + static_cast<int64_t>(i + a * step) * width);
  Number<T> numbers[kVectors * width];
#pragma unroll
  for (int a = 0; a < kVectors; ++a) {
    if constexpr (kKeep) cache[i + a * step] = vectors[a];
    widen_vector<T>(vectors[a], numbers + a * width);
  }
  add_logits<T, kVectors * width>(running, numbers);
}

// Reads the vectors [first, last).
template <typename T, bool kKeep>
__device__ __forceinline__ void read_range(Running<Number<T>>& running, const T* source, int first, int last, Wide<T>* cache) {
  const int step = static_cast<int>(blockDim.x);
  int i = first + static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; i + (kAhead<T> - 1) * step < last; i += kAhead<T> * step) read_vectors<T, kAhead<T>, kKeep>(running, source, i, step, cache);
#pragma unroll 1
  for (; i < last; i += step) read_vectors<T, 1, kKeep>(running, source, i, step, cache);
}

// Calls `use` with each column of a row that is outside of its aligned vectors: the columns before them and after them.
template <typename T, typename Use>
__device__ __forceinline__ void for_loose_columns(RowCut cut, int columns, const Use& use) {
  const int in_vectors = cut.vectors * kVectorWidth<T>, loose = columns - in_vectors;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < loose; i += static_cast<int>(blockDim.x)) use(i < cut.head ? i : i + in_vectors);
}

// Reads a row, or this block's part of it, once; the first `kept` vectors are also copied to shared memory.
template <typename T>
__device__ __forceinline__ Running<Number<T>> read_row(const T* row, int columns, RowCut cut, Wide<T>* cache, int kept) {
  using A = Number<T>;
  Running<A> running = no_logits<A>();
  for_loose_columns<T>(cut, columns, [&](int v) {
    const A number = widen(row[v]);
    add_logits<T, 1>(running, &number);
  });
  read_range<T, true>(running, row + cut.head, 0, kept, cache);
  read_range<T, false>(running, row + cut.head, kept, cut.vectors, nullptr);
  return running;
}

template <typename T, int kVectors, bool kKept>
__device__ __forceinline__ void write_vectors(
    const T* source, T* out, int i, int step, const Wide<T>* cache, Number<T> largest, Number<T> factor) {
  constexpr int width = kVectorWidth<T>;
  Wide<T> vectors[kVectors];
#pragma unroll
  for (int a = 0; a < kVectors; ++a) {
    vectors[a] = kKept ? cache[i + a * step] : load_vector<width>(source + static_cast<int64_t>(i + a * step) * width);
  }
#pragma unroll
  for (int a = 0; a < kVectors; ++a) {
    Number<T> numbers[width];
    widen_vector<T>(vectors[a], numbers);
#pragma unroll
    for (int j = 0; j < width; ++j) numbers[j] = exponential<T>(numbers[j], largest) * factor;
    store_vector<width>(out + static_cast<int64_t>(i + a * step) * width, narrow_vector<T>(numbers));
  }
}

template <typename T, bool kKept>
__device__ __forceinline__ void write_range(
    const T* source, T* out, int first, int last, const Wide<T>* cache, Number<T> largest, Number<T> factor) {
  const int step = static_cast<int>(blockDim.x);
  int i = first + static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; i + (kAhead<T> - 1) * step < last; i += kAhead<T> * step) {
    write_vectors<T, kAhead<T>, kKept>(source, out, i, step, cache, largest, factor);
  }
#pragma unroll 1
  for (; i < last; i += step) write_vectors<T, 1, kKept>(source, out, i, step, cache, largest, factor);
}

// out = exp(row - largest) * factor.
template <typename T>
__device__ __forceinline__ void write_gradient(
    const T* row, T* out, int columns, RowCut cut, const Wide<T>* cache, int kept, Number<T> largest, Number<T> factor) {
  for_loose_columns<T>(cut, columns, [&](int v) { out[v] = narrow<T>(exponential<T>(widen(row[v]), largest) * factor); });
  write_range<T, true>(row + cut.head, out + cut.head, 0, kept, cache, largest, factor);
  write_range<T, false>(row + cut.head, out + cut.head, kept, cut.vectors, nullptr, largest, factor);
}

// A label of a row: its column in this shard, or -1 where it is ignored or belongs to another shard.
struct Label {
  int column;
  bool scored;
};

__device__ __forceinline__ Label label_at(const int64_t* labels, int k, int64_t vocab_start, int vocab) {
  const int64_t label = labels[k];
  const bool scored = label != kIgnoreIndex;
  const bool here = scored && label >= vocab_start && label - vocab_start < vocab;
  return {here ? static_cast<int>(label - vocab_start) : -1, scored};
}

__device__ __forceinline__ void check_label(const int64_t* labels, int k, Label label, int64_t row, int vocab) {
  if (label.scored && label.column < 0) {
    MP_TRAP(
        "megatron_patch: labels hold %lld in row %lld; allowed: 0 to %lld, and -100 for those that are not scored\n",
        static_cast<long long>(labels[k]), static_cast<long long>(row), static_cast<long long>(vocab - 1));
  }
}

// Shared memory of a label, which needs no register while the row is read: its column (-1: not in this shard), its logit and later its
// gradient, and the column that gets this gradient (-1 where an earlier label has the same column).
template <typename A>
struct AtLabel {
  A value;
  int column;
  int corrected;
};

// The sum of the weights of all labels in k's column. Sets `first` to whether k is the first of them.
template <typename A, typename Weight>
__device__ __forceinline__ A taken_from(const AtLabel<A>* at_labels, int k, int num_labels, const Weight& weight, bool* first) {
  const int column = at_labels[k].column;
  A taken = 0;
  *first = column >= 0;
#pragma unroll 1
  for (int other = 0; other < num_labels; ++other) {
    if (at_labels[other].column != column) continue;
    if (other < k) *first = false;
    taken += weight(other);
  }
  return taken;
}

// Computes the gradient of each label's column in [begin, end): exp(logit - largest) * factor minus the weights of its labels.
template <typename T, typename Weight>
__device__ __forceinline__ void find_corrections(
    AtLabel<Number<T>>* at_labels, int num_labels, const Weight& weight, Number<T> largest, Number<T> factor, int begin, int end) {
  const int k = reread_thread_index();
  if (k >= num_labels || at_labels[k].column < 0) return;
  bool first;
  const Number<T> taken = taken_from(at_labels, k, num_labels, weight, &first);
  const int column = at_labels[k].column;
  at_labels[k].value = exponential<T>(at_labels[k].value, largest) * factor - taken;
  at_labels[k].corrected = first && column >= begin && column < end ? column : -1;
}

// Writes the gradients of the columns that have labels.
template <typename T>
__device__ __forceinline__ void correct(T* row, int num_labels, const AtLabel<Number<T>>* at_labels) {
  const int k = reread_thread_index();
  if (k < num_labels && at_labels[k].corrected >= 0) row[at_labels[k].corrected] = narrow<T>(at_labels[k].value);
}

// The start of a block's dynamic shared memory, through which its threads communicate. The labels follow it, and then the row.
template <typename A>
struct Scratch {
  Results<A> results;
  Running<A> part;
  A largest;
  A factor;
};

template <typename A>
constexpr __host__ __device__ int scratch_bytes(int num_labels) {
  return (static_cast<int>(sizeof(Scratch<A>)) + num_labels * static_cast<int>(sizeof(AtLabel<A>)) + 15) / 16 * 16;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAProcessor<T>) statistics_kernel(
    const T* __restrict__ logits, int64_t stride, const int64_t* __restrict__ labels, int num_labels, int64_t vocab_start, int vocab,
    bool check, Number<T>* __restrict__ out) {
  using A = Number<T>;
  __shared__ Results<A> results;
  const int64_t row = blockIdx.x;
  const T* source = logits + row * stride;
  const RowCut cut = cut_row(source, vocab);
  results.threads[threadIdx.x] = read_row<T>(source, vocab, cut, nullptr, 0);
  A* target = out + row * (2 + num_labels);
  const int64_t* mine = labels + row * num_labels;
  merge_block<T>(results, [&](Running<A> whole) {
    if (threadIdx.x != 0) return;
    target[0] = whole.largest;
    target[1] = whole.sum;
  });
  for (int k = static_cast<int>(threadIdx.x); k < num_labels; k += static_cast<int>(blockDim.x)) {
    const Label label = label_at(mine, k, vocab_start, vocab);
    if (check) check_label(mine, k, label, row, vocab);
    target[2 + k] = label.column < 0 ? A(0) : widen(source[label.column]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAProcessor<T>) gradient_kernel(
    const T* logits, int64_t stride, const int64_t* __restrict__ labels, int num_labels, int64_t vocab_start, int vocab,
    const Number<T>* __restrict__ normalizer, const Number<T>* __restrict__ grad_nll, const Number<T>* __restrict__ grad_lse, T* out,
    int64_t out_stride) {
  using A = Number<T>;
  __shared__ A shared_factor;
  __shared__ AtLabel<A> at_labels[kMaxLabels];
  const int64_t row = blockIdx.x;
  const T* source = logits + row * stride;
  T* target = out + row * out_stride;
  const int64_t* mine = labels + row * num_labels;
  const A* weights = grad_nll + row * num_labels;
  const A largest = normalizer[2 * row];
  const int k = static_cast<int>(threadIdx.x);
  if (k < kWarp) {
    A total = 0;
#pragma unroll 1
    for (int other = k; other < num_labels; other += kWarp) total += label_at(mine, other, vocab_start, vocab).scored ? weights[other] : A(0);
    total = warp_sum(total);
    if (k == 0) shared_factor = (total + grad_lse[row]) / normalizer[2 * row + 1];
  }
  if (k < num_labels) {
    const int column = label_at(mine, k, vocab_start, vocab).column;
    at_labels[k] = {column < 0 ? A(0) : widen(source[column]), column, -1};
  }
  __syncthreads();  // the labels' logits must be read before any logit is overwritten
  const A factor = shared_factor;
  find_corrections<T>(at_labels, num_labels, [&](int other) { return weights[other]; }, largest, factor, 0, vocab);
  RowCut cut = cut_row(source, vocab);
  // Vectors need the same alignment in source and target.
  if ((reinterpret_cast<uintptr_t>(source) - reinterpret_cast<uintptr_t>(target)) % 16 != 0) cut = {vocab, 0};
  write_gradient<T>(source, target, vocab, cut, nullptr, 0, largest, factor);
  __syncthreads();
  correct(target, num_labels, at_labels);
}

// With kCluster, the `parts` blocks of a cluster share a row: each processes `columns` of it, and reads the other blocks' largest logit and
// sum through distributed shared memory.
template <typename T, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAProcessor<T>) loss_and_gradient_kernel(
    T* logits, int64_t stride, const int64_t* __restrict__ labels, int num_labels, int vocab, const Number<T>* __restrict__ weights,
    Number<T> z_loss, int parts, int columns, int cache_vectors, Number<T>* __restrict__ loss) {
  using A = Number<T>;
  MP_DYNAMIC_SHARED(bytes);
  auto& scratch = *reinterpret_cast<Scratch<A>*>(bytes);
  auto* at_labels = reinterpret_cast<AtLabel<A>*>(bytes + sizeof(Scratch<A>));
  auto* cache = reinterpret_cast<Wide<T>*>(bytes + scratch_bytes<A>(num_labels));
  const int64_t row = kCluster ? blockIdx.x / static_cast<unsigned>(parts) : blockIdx.x;
  const int rank = kCluster ? static_cast<int>(blockIdx.x % static_cast<unsigned>(parts)) : 0;
  T* const target = logits + row * stride;
  const int64_t* const mine = labels + row * num_labels;
  int begin = 0, width = vocab;
  if constexpr (kCluster) {
    begin = rank * columns < vocab ? rank * columns : vocab;
    width = vocab - begin < columns ? vocab - begin : columns;
  }
  const RowCut cut = cut_row(target + begin, width);
  // A multiple of a loop iteration, or everything: so the order of additions does not depend on the size of the cache.
  const int turn = kAhead<T> * static_cast<int>(blockDim.x);
  const int kept = cache_vectors < cut.vectors ? cache_vectors / turn * turn : cut.vectors;
  scratch.results.threads[threadIdx.x] = read_row<T>(target + begin, width, cut, cache, kept);

  const auto weight = [&](int k) { return weights == nullptr ? A(1) : weights[k]; };
  const int k = static_cast<int>(threadIdx.x);
  if (k < num_labels) {
    const Label label = label_at(mine, k, 0, vocab);
    check_label(mine, k, label, row, vocab);
    at_labels[k] = {label.column < 0 ? A(0) : widen(target[label.column]), label.column, -1};
  }
  const auto find_factor = [&](Running<A> whole) {
    A total_weight = 0, below = 0;
#pragma unroll 1
    for (int other = k; other < num_labels; other += kWarp) {
      if (at_labels[other].column < 0) continue;
      total_weight += weight(other);
      below += weight(other) * (whole.largest - at_labels[other].value);
    }
    total_weight = warp_sum(total_weight);
    below = warp_sum(below);
    const A log_sum = logarithm(whole.sum), lse = whole.largest + log_sum;
    if (k == 0) {
      scratch.largest = whole.largest;
      scratch.factor = total_weight == A(0) ? A(0) : total_weight * (A(1) + A(2) * z_loss * lse) / whole.sum;
      if (rank == 0) loss[row] = total_weight == A(0) ? A(0) : below + total_weight * (log_sum + z_loss * lse * lse);
    }
  };
  if constexpr (kCluster) {
    merge_block<T>(scratch.results, [&](Running<A> part) {
      if (k == 0) scratch.part = part;
    });
    cluster_arrive();
    cluster_wait();  // every label's logit must be read before any block of the row overwrites it
    if (k < kWarp) find_factor(merge_lanes<T>(k < parts ? *of_block(&scratch.part, k) : no_logits<A>()));
  } else {
    merge_block<T>(scratch.results, find_factor);
  }
  __syncthreads();
  if constexpr (kCluster) cluster_arrive();  // this block no longer reads the others' shared memory
  const A largest = scratch.largest, factor = scratch.factor;
  find_corrections<T>(at_labels, num_labels, weight, largest, factor, begin, begin + width);
  write_gradient<T>(target + begin, target + begin, width, cut, cache, kept, largest, factor);
  __syncthreads();
  correct(target, num_labels, at_labels);
  if constexpr (kCluster) cluster_wait();  // no block may exit while others can still read its shared memory
}

// Threads of a block: about 4 vectors for each thread, at least one thread for each label, and a power of two.
int threads_for(int64_t columns, int64_t num_labels, int width) {
  const int64_t wanted = columns / (4 * width) > num_labels ? columns / (4 * width) : num_labels;
  int threads = kMinThreads;
  while (threads < kMaxThreads && threads < wanted) threads *= 2;
  return threads;
}

// Checks that a row can be counted in 32 bits, that the grid is not too large, and that each label has a thread.
cudaError_t check_sizes(int64_t blocks, int64_t num_labels, int64_t vocab) {
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  return vocab > kMaxColumns || num_labels > kMaxThreads ? cudaErrorInvalidValue : cudaSuccess;
}

// How a row is kept in shared memory between its two passes: by a cluster of 2, 4 or 8 blocks, or by one of these rules.
enum Residence : int {
  kBySize = 0,  // by divide()'s rule
  kHalf = -1,   // as much as fits half of a multiprocessor's shared memory, so that two blocks share a multiprocessor
  kWhole = -2,  // as much as fits all of a multiprocessor's shared memory
};

// How a row is divided among blocks, and how much of it each block keeps in shared memory.
struct Division {
  int parts;
  int columns;
  int cache_vectors;
  int shared_bytes;
};

// A row that fits half of a multiprocessor's shared memory (`limit` bytes) gets one block. A longer row is shared by a cluster where there
// are clusters, and otherwise gets a multiprocessor for itself.
Division divide(int residence, int64_t vocab, int width, int scratch, int limit, bool clusters) {
  // CUDA reserves one kilobyte for each block.
  const int64_t half = limit / 2 - 1024, whole = limit;
  const auto per_part = [&](int parts) { return ((vocab + width - 1) / width + parts - 1) / parts; };
  const auto bytes = [&](int parts) { return scratch + 16 * per_part(parts); };
  int parts = residence > 1 ? residence : 1;
  if (residence == kBySize && clusters) {
    while (parts < kMaxParts && bytes(parts) > half) parts *= 2;
  }
  const int64_t room = bytes(parts) <= half || residence == kHalf ? half : whole;
  const int64_t vectors = bytes(parts) <= room ? per_part(parts) : (room > scratch ? (room - scratch) / 16 : 0);
  return {parts, static_cast<int>(per_part(parts) * width), static_cast<int>(vectors), static_cast<int>(scratch + 16 * vectors)};
}

// Whether the blocks of a cluster can share a row: the GPU must have clusters, and its code must be compiled for them. Cached for each
// device.
bool has_clusters(int device) {
  int launches = 0;
  if (cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) != cudaSuccess || launches == 0) return false;
  static std::atomic<uint64_t> compiled{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((compiled.load() & bit) != 0) return true;
  cudaFuncAttributes code;
  const auto kernel = loss_and_gradient_kernel<float, true>;
  if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess || code.ptxVersion < 90 || code.binaryVersion < 90) return false;
  compiled.fetch_or(bit);
  return true;
}

// Raises a kernel's limit of dynamic shared memory, once for each device; two threads that do so at the same time do no harm.
template <typename T, bool kCluster>
cudaError_t allow_shared_memory(int device, int limit) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load() & bit) != 0) return cudaSuccess;
  const auto kernel = loss_and_gradient_kernel<T, kCluster>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  allowed.fetch_or(bit);
  return cudaSuccess;
}

}  // namespace

cudaError_t mp_loss_statistics(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, bool check, void* out, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const cudaError_t wrong = check_sizes(num_rows, num_labels, vocab);
  if (wrong != cudaSuccess) return wrong;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto kernel = statistics_kernel<T>;
    MP_LAUNCH(
        kernel, dim3(static_cast<unsigned>(num_rows)), dim3(threads_for(vocab, num_labels, kVectorWidth<T>)), 0, stream,
        static_cast<const T*>(logits), stride, labels, static_cast<int>(num_labels), vocab_start, static_cast<int>(vocab), check,
        static_cast<Number<T>*>(out));
    return cudaGetLastError();
  });
}

cudaError_t mp_loss_gradient(
    NumberType type, const void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab_start,
    int64_t vocab, const void* normalizer, const void* grad_nll, const void* grad_lse, void* out, int64_t out_stride, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const cudaError_t wrong = check_sizes(num_rows, num_labels, vocab);
  if (wrong != cudaSuccess) return wrong;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Number<T>;
    const auto kernel = gradient_kernel<T>;
    MP_LAUNCH(
        kernel, dim3(static_cast<unsigned>(num_rows)), dim3(threads_for(vocab, num_labels, kVectorWidth<T>)), 0, stream,
        static_cast<const T*>(logits), stride, labels, static_cast<int>(num_labels), vocab_start, static_cast<int>(vocab),
        static_cast<const A*>(normalizer), static_cast<const A*>(grad_nll), static_cast<const A*>(grad_lse), static_cast<T*>(out), out_stride);
    return cudaGetLastError();
  });
}

cudaError_t mp_loss_and_gradient(
    NumberType type, void* logits, int64_t stride, const int64_t* labels, int64_t num_rows, int64_t num_labels, int64_t vocab,
    const void* weights, double z_loss, void* loss, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const cudaError_t wrong = check_sizes(num_rows, num_labels, vocab);
  if (wrong != cudaSuccess) return wrong;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Number<T>;
    const Division division =
        divide(MP_LOSS_RESIDENCE, vocab, kVectorWidth<T>, scratch_bytes<A>(static_cast<int>(num_labels)), limit, has_clusters(device));
    if (!fits_grid(num_rows * division.parts)) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(num_rows * division.parts));
    const dim3 block(threads_for(division.columns, num_labels, kVectorWidth<T>));
    const auto launch = [&](auto cluster) {
      constexpr bool is_cluster = decltype(cluster)::value;
      const cudaError_t refused = allow_shared_memory<T, is_cluster>(device, limit);
      if (refused != cudaSuccess) return refused;
      const auto kernel = loss_and_gradient_kernel<T, is_cluster>;
      MP_LAUNCH_CLUSTER(
          kernel, division.parts, grid, block, division.shared_bytes, stream, static_cast<T*>(logits), stride, labels,
          static_cast<int>(num_labels), static_cast<int>(vocab), static_cast<const A*>(weights), static_cast<A>(z_loss), division.parts,
          division.columns, division.cache_vectors, static_cast<A*>(loss));
      return cudaGetLastError();
    };
    return division.parts > 1 ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

}  // namespace megatron_patch::cuda
