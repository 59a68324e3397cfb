// Patch embedding. Each thread processes some adjacent columns of a patch (forward) or of a tile of sorted occurrences (backward).
// The backward pass sums the occurrences of each row in their order, without atomics, so that every run gives the same bits.
#include "common.cuh"

namespace megatron_patch::cuda {
namespace {

constexpr int kThreads = 128;
// Rows that a thread loads before it uses the first.
constexpr int kFlight = 4;
constexpr int32_t kNoRow = std::numeric_limits<int32_t>::min();

// Turns a sum into a mean. The reciprocal is 0 unless K is a power of two, because otherwise its product can differ from the quotient.
template <typename A>
struct Mean {
  A patch_size;
  A reciprocal;

  explicit Mean(int64_t size) : patch_size(static_cast<A>(size)), reciprocal((size & (size - 1)) == 0 ? A(1) / patch_size : A(0)) {}

  template <int kWidth>
  __device__ __forceinline__ void of(A* sums) const {
    if (reciprocal != A(0)) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] *= reciprocal;
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] /= patch_size;
    }
  }
};

// A vector as it is loaded. Its numbers are unpacked where they are added; if they were unpacked at the load, each load would wait for the
// one before it.
template <typename T, int kWidth>
using Packed = typename Word<static_cast<int>(sizeof(T)) * kWidth>::type;

template <typename T, int kWidth>
__device__ __forceinline__ Packed<T, kWidth> load_packed(const T* source) {
  return *reinterpret_cast<const Packed<T, kWidth>*>(source);
}

template <typename T, int kWidth>
__device__ __forceinline__ void add_packed(Number<T>* sums, const Packed<T, kWidth>& word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kWidth % 2 == 0) {
    // A bfloat16 is the upper half of a float, so one instruction converts it.
    uint32_t pairs[kWidth / 2];
    memcpy(pairs, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < kWidth / 2; ++j) {
      const uint32_t bits[2] = {pairs[j] << 16, pairs[j] & 0xffff0000u};
      float both[2];
      memcpy(both, bits, sizeof(bits));
      sums[2 * j] += both[0];
      sums[2 * j + 1] += both[1];
    }
  } else {
    Vector<T, kWidth> vector;
    memcpy(&vector, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += widen(vector.values[j]);
  }
}

// Prints the first id of a patch that is outside of the table, and traps.
__device__ inline void refuse_patch(const int64_t* ids, int64_t patch_size, int64_t patch, int64_t num_rows) {
#pragma unroll 1
  for (int64_t k = 0; k < patch_size; ++k) {
    const int64_t id = ids[patch * patch_size + k];
    if (id >= 0 && id < num_rows) continue;
    MP_TRAP(
        "megatron_patch: token_ids hold %lld in patch %lld; allowed: 0 to %lld\n", static_cast<long long>(id),
        static_cast<long long>(patch), static_cast<long long>(num_rows - 1));
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_narrow(T* target, const Number<T>* sums) {
  Vector<T, kWidth> vector;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) vector.values[j] = narrow<T>(sums[j]);
  store_vector<kWidth>(target, vector);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* __restrict__ weight, const int64_t* __restrict__ ids, int64_t patch_size, Mean<Number<T>> mean, int64_t hidden,
    int64_t first_row, int64_t num_rows, bool check, T* __restrict__ out) {
  using A = Number<T>;
  const int64_t patch = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  // -0 is the neutral element of addition: +0 would turn a sum of -0 into +0.
  A sum[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sum[j] = A(-0.0);
  bool empty = true, outside = false;
  const int64_t* patch_ids = ids + patch * patch_size;
  const T* table = weight + column;
  for (int64_t start = 0; start < patch_size; start += kFlight) {
    int64_t rows[kFlight];
    bool here[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const bool given = start + i < patch_size;
      rows[i] = (given ? patch_ids[start + i] : 0) - first_row;
      const bool inside = static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(num_rows);
      here[i] = given && inside;
      outside |= given && !inside;
    }
    Packed<T, kWidth> words[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (here[i]) words[i] = load_packed<T, kWidth>(table + rows[i] * hidden);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (!here[i]) continue;
      add_packed<T, kWidth>(sum, words[i]);
      empty = false;
    }
  }
  if (check && outside && column == 0) refuse_patch(ids, patch_size, patch, num_rows);
  mean.template of<kWidth>(sum);
  if (empty) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] = 0;
  }
  store_narrow<T, kWidth>(out + patch * hidden + column, sum);
}

// The keys by which the backward pass sorts: an id's row in this shard; -1 for ids below the shard, num_rows for ids above it. So all
// shards sort ids into the same order and the same tiles, by which sums are split.
__global__ void __launch_bounds__(kThreads) rows_kernel(
    const int64_t* __restrict__ ids, int64_t count, int64_t first_row, int64_t num_rows, int32_t* __restrict__ rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t id = ids[i];
  rows[i] = static_cast<int32_t>(id < first_row ? -1 : id - first_row < num_rows ? id - first_row : num_rows);
}

// The destination of a row's gradient: a table of T, whose row it replaces, or an accumulator, to whose row it is added.
template <typename T, int kWidth>
struct Target {
  T* table;
  Number<T>* accumulator;
  int64_t hidden;

  __device__ __forceinline__ void write(int64_t row, int64_t column, Number<T>* sum, const Mean<Number<T>>& mean) const {
    const int64_t place = row * hidden + column;
    mean.template of<kWidth>(sum);
    if (accumulator == nullptr) {
      store_narrow<T, kWidth>(table + place, sum);
    } else {
      add_sums<kWidth>(sum, accumulator + place);
      store_sums<kWidth>(accumulator + place, sum);
    }
  }
};

// Sums the runs of equal rows inside one tile. The sum of a run that lies in this tile goes to the target; that of a run that began in an
// earlier tile goes to partial[tile, 0]; that of a run that begins here and continues in the next tile goes to partial[tile, 1].
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) tile_kernel(
    const T* __restrict__ grad, const int32_t* __restrict__ sorted_ids, const int64_t* __restrict__ order, int64_t count,
    int64_t patch_size, Mean<Number<T>> mean, int32_t num_rows, Number<T>* __restrict__ partial, Target<T, kWidth> target) {
  using A = Number<T>;
  __shared__ int32_t ids[kTile + 1];
  __shared__ int64_t places[kTile];
  const int64_t tile = blockIdx.x, begin = tile * kTile, hidden = target.hidden;
  int size = static_cast<int>(count - begin < kTile ? count - begin : kTile);
  static_assert(kTile <= kThreads, "a thread fetches one occurrence");
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < size) {
    ids[thread] = sorted_ids[begin + thread];
    places[thread] = order[begin + thread] / patch_size * hidden;
  }
  // The row after the tile; after the last tile a value that is not a row.
  if (thread == 0) ids[size] = begin + size < count ? sorted_ids[begin + size] : kNoRow;
  const bool began_before = begin > 0 && sorted_ids[begin - 1] == sorted_ids[begin];
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  // Ids of other shards are sorted before and after this shard's rows; most of their tiles hold nothing else.
  if (column >= hidden || ids[size - 1] < 0 || ids[0] >= num_rows) return;
  int first = 0;
  while (ids[first] < 0) ++first;
  while (ids[size - 1] >= num_rows) --size;
  A sum[kWidth] = {};
  bool carried = began_before && first == 0;
  for (int start = first; start < size; start += kFlight) {
    Packed<T, kWidth> words[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (start + i < size) words[i] = load_packed<T, kWidth>(grad + places[start + i] + column);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int entry = start + i;
      if (entry >= size) break;
      add_packed<T, kWidth>(sum, words[i]);
      const bool ends = ids[entry + 1] != ids[entry];
      if (!ends && entry + 1 < size) continue;
      if (carried || !ends) store_sums<kWidth>(partial + (tile * 2 + (carried ? 0 : 1)) * hidden + column, sum);
      else target.write(ids[entry], column, sum, mean);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = 0;
      carried = false;
    }
  }
}

// Sums the parts of each run that crosses tiles, in order. The block of the tile in which the run begins does this.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) join_kernel(
    const int32_t* __restrict__ sorted_ids, int64_t count, Mean<Number<T>> mean, int32_t num_rows, const Number<T>* __restrict__ partial,
    Target<T, kWidth> target) {
  using A = Number<T>;
  const int64_t tile = blockIdx.x, begin = tile * kTile, end = begin + kTile, hidden = target.hidden;
  if (end >= count) return;
  const int32_t id = sorted_ids[end - 1];
  const bool continues = sorted_ids[end] == id;
  const bool began_before = begin > 0 && sorted_ids[begin - 1] == id;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (!continues || began_before || id < 0 || id >= num_rows || column >= hidden) return;
  A sum[kWidth] = {};
  add_sums<kWidth>(sum, partial + (tile * 2 + 1) * hidden + column);
  for (int64_t next = tile + 1;; ++next) {
    add_sums<kWidth>(sum, partial + next * 2 * hidden + column);
    const int64_t last = (next + 1) * kTile;
    if (last >= count || sorted_ids[last] != id) break;
  }
  target.write(id, column, sum, mean);
}

dim3 grid_of(int64_t rows, int64_t hidden, int width) {
  const int64_t columns = kThreads * static_cast<int64_t>(width);
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>((hidden + columns - 1) / columns));
}

bool fits_vectors(int64_t hidden, int width, int64_t size, const void* first, const void* second) {
  const auto aligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % (width * size) == 0; };
  return hidden % width == 0 && aligned(first) && aligned(second);
}

}  // namespace

cudaError_t mp_patch_embedding_forward(
    NumberType type, const void* weight, const int64_t* ids, int64_t num_patches, int64_t patch_size, int64_t hidden, int64_t first_row,
    int64_t num_rows, bool check, void* out, cudaStream_t stream) {
  if (num_patches == 0 || hidden == 0) return cudaSuccess;
  if (!fits_grid(num_patches)) return cudaErrorInvalidConfiguration;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(hidden, kVectorWidth<T>, sizeof(T), weight, out);
    const dim3 grid = grid_of(num_patches, hidden, wide ? kVectorWidth<T> : 1);
    const auto kernel = wide ? forward_kernel<T, kVectorWidth<T>> : forward_kernel<T, 1>;
    MP_LAUNCH(
        kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(weight), ids, patch_size, Mean<Number<T>>(patch_size), hidden,
        first_row, num_rows, check, static_cast<T*>(out));
    return cudaGetLastError();
  });
}

cudaError_t mp_patch_embedding_rows(
    const int64_t* ids, int64_t count, int64_t first_row, int64_t num_rows, int32_t* rows, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  if (!fits_grid(blocks) || num_rows > kMaxRows) return cudaErrorInvalidConfiguration;
  MP_LAUNCH(rows_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, ids, count, first_row, num_rows, rows);
  return cudaGetLastError();
}

cudaError_t mp_patch_embedding_backward(
    NumberType type, const void* grad, const int32_t* sorted_rows, const int64_t* order, int64_t count, int64_t patch_size, int64_t hidden,
    int64_t num_rows, void* partial, void* target, bool accumulate, cudaStream_t stream) {
  if (count == 0 || hidden == 0) return cudaSuccess;
  const int64_t num_tiles = (count + kTile - 1) / kTile;
  if (!fits_grid(num_tiles) || num_rows > kMaxRows) return cudaErrorInvalidConfiguration;
  const auto rows = static_cast<int32_t>(num_rows);
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Number<T>;
    const bool wide = fits_vectors(hidden, kVectorWidth<T>, sizeof(T), grad, target);
    const dim3 grid = grid_of(num_tiles, hidden, wide ? kVectorWidth<T> : 1);
    const auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const Mean<A> mean(patch_size);
      auto* sums = static_cast<A*>(partial);
      const Target<T, kWidth> place{
          accumulate ? nullptr : static_cast<T*>(target), accumulate ? static_cast<A*>(target) : nullptr, hidden};
      const auto tiles = tile_kernel<T, kWidth>;
      MP_LAUNCH(
          tiles, grid, dim3(kThreads), 0, stream, static_cast<const T*>(grad), sorted_rows, order, count, patch_size, mean, rows, sums,
          place);
      const auto join = join_kernel<T, kWidth>;
      MP_LAUNCH(join, grid, dim3(kThreads), 0, stream, sorted_rows, count, mean, rows, static_cast<const A*>(sums), place);
      return cudaGetLastError();
    };
    return wide ? run(std::integral_constant<int, kVectorWidth<T>>()) : run(std::integral_constant<int, 1>());
  });
}

}  // namespace megatron_patch::cuda
