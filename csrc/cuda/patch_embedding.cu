// Patch embedding: a thread owns some neighbouring columns of a patch (forward) or of a tile of sorted occurrences (backward).
// The backward pass sums each id's occurrences in their order, without atomics: the same bits on every run.
#include "common.cuh"

namespace megatron_patch::cuda {
namespace {

constexpr int kThreads = 128;
// Rows whose loads are under way together.
constexpr int kFlight = 4;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* __restrict__ weight, const int64_t* __restrict__ ids, int64_t patch_size, int64_t hidden, int64_t first_row, int64_t num_rows,
    bool check, T* __restrict__ out) {
  using A = Number<T>;
  const int64_t patch = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  A sum[kWidth] = {};
  bool first = true;
  for (int64_t start = 0; start < patch_size; start += kFlight) {
    Vector<T, kWidth> rows[kFlight];
    bool here[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      here[i] = false;
      if (start + i < patch_size) {
        const int64_t id = ids[patch * patch_size + start + i];
        here[i] = id >= first_row && id - first_row < num_rows;
        if (here[i]) rows[i] = load_vector<kWidth>(weight + (id - first_row) * hidden + column);
        else if (check && column == 0) {
          MP_TRAP(
              "megatron_patch: token_ids hold %lld in patch %lld; allowed: 0 to %lld\n", static_cast<long long>(id),
              static_cast<long long>(patch), static_cast<long long>(num_rows - 1));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (!here[i]) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = first ? widen(rows[i].values[j]) : sum[j] + widen(rows[i].values[j]);
      first = false;
    }
  }
  Vector<T, kWidth> mean;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) mean.values[j] = narrow<T>(sum[j] / static_cast<A>(patch_size));
  store_vector<kWidth>(out + patch * hidden + column, mean);
}

template <typename T, int kWidth>
__device__ __forceinline__ void write_row(const Number<T>* sum, int64_t patch_size, T* target) {
  Vector<T, kWidth> mean;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) mean.values[j] = narrow<T>(sum[j] / static_cast<Number<T>>(patch_size));
  store_vector<kWidth>(target, mean);
}

// Sums the runs of equal ids inside one tile. A run that is whole goes to its row; of one that began in an earlier tile the sum goes to
// partial[tile, 0], of one that begins here and goes on to partial[tile, 1].
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) tile_kernel(
    const T* __restrict__ grad, const int64_t* __restrict__ sorted_ids, const int64_t* __restrict__ order, int64_t count,
    int64_t patch_size, int64_t hidden, int64_t first_row, int64_t num_rows, Number<T>* __restrict__ partial, T* __restrict__ grad_weight) {
  using A = Number<T>;
  __shared__ int64_t ids[kTile + 1];
  __shared__ int64_t patches[kTile];
  const int64_t tile = blockIdx.x, begin = tile * kTile;
  const int size = static_cast<int>(count - begin < kTile ? count - begin : kTile);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    ids[i] = sorted_ids[begin + i];
    patches[i] = order[begin + i] / patch_size;
  }
  // The id behind the tile; one that is no id behind the last tile.
  if (threadIdx.x == 0) ids[size] = begin + size < count ? sorted_ids[begin + size] : kNoId;
  const bool began_before = begin > 0 && sorted_ids[begin - 1] == sorted_ids[begin];
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (column >= hidden) return;
  A sum[kWidth] = {};
  bool carried = began_before;
  for (int start = 0; start < size; start += kFlight) {
    Vector<T, kWidth> rows[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (start + i < size) rows[i] = load_vector<kWidth>(grad + patches[start + i] * hidden + column);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int entry = start + i;
      if (entry >= size) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] += widen(rows[i].values[j]);
      const bool ends = ids[entry + 1] != ids[entry];
      if (!ends && entry + 1 < size) continue;
      const int64_t row = ids[entry] - first_row;
      if (carried || !ends) {
        store_sums<kWidth>(partial + (tile * 2 + (carried ? 0 : 1)) * hidden + column, sum);
      } else if (row >= 0 && row < num_rows) {
        write_row<T, kWidth>(sum, patch_size, grad_weight + row * hidden + column);
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = 0;
      carried = false;
    }
  }
}

// Puts runs that cross tiles together, in order; the block of the tile in which a run begins does it.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) join_kernel(
    const int64_t* __restrict__ sorted_ids, int64_t count, int64_t patch_size, int64_t hidden, int64_t first_row, int64_t num_rows,
    const Number<T>* __restrict__ partial, T* __restrict__ grad_weight) {
  using A = Number<T>;
  const int64_t tile = blockIdx.x, begin = tile * kTile, end = begin + kTile;
  if (end >= count) return;
  const int64_t id = sorted_ids[end - 1], row = id - first_row;
  const bool goes_on = sorted_ids[end] == id;
  const bool began_before = begin > 0 && sorted_ids[begin - 1] == id;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (!goes_on || began_before || row < 0 || row >= num_rows || column >= hidden) return;
  A sum[kWidth] = {};
  add_sums<kWidth>(sum, partial + (tile * 2 + 1) * hidden + column);
  for (int64_t next = tile + 1;; ++next) {
    add_sums<kWidth>(sum, partial + next * 2 * hidden + column);
    const int64_t last = (next + 1) * kTile;
    if (last >= count || sorted_ids[last] != id) break;
  }
  write_row<T, kWidth>(sum, patch_size, grad_weight + row * hidden + column);
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
        kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(weight), ids, patch_size, hidden, first_row, num_rows, check,
        static_cast<T*>(out));
    return cudaGetLastError();
  });
}

cudaError_t mp_patch_embedding_backward(
    NumberType type, const void* grad, const int64_t* sorted_ids, const int64_t* order, int64_t count, int64_t patch_size, int64_t hidden,
    int64_t first_row, int64_t num_rows, void* partial, void* grad_weight, cudaStream_t stream) {
  if (count == 0 || hidden == 0) return cudaSuccess;
  const int64_t num_tiles = (count + kTile - 1) / kTile;
  if (!fits_grid(num_tiles)) return cudaErrorInvalidConfiguration;
  return dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(hidden, kVectorWidth<T>, sizeof(T), grad, grad_weight);
    const dim3 grid = grid_of(num_tiles, hidden, wide ? kVectorWidth<T> : 1);
    auto* sums = static_cast<Number<T>*>(partial);
    const auto tiles = wide ? tile_kernel<T, kVectorWidth<T>> : tile_kernel<T, 1>;
    MP_LAUNCH(
        tiles, grid, dim3(kThreads), 0, stream, static_cast<const T*>(grad), sorted_ids, order, count, patch_size, hidden, first_row,
        num_rows, sums, static_cast<T*>(grad_weight));
    const auto join = wide ? join_kernel<T, kVectorWidth<T>> : join_kernel<T, 1>;
    MP_LAUNCH(
        join, grid, dim3(kThreads), 0, stream, sorted_ids, count, patch_size, hidden, first_row, num_rows,
        static_cast<const Number<T>*>(sums), static_cast<T*>(grad_weight));
    return cudaGetLastError();
  });
}

}  // namespace megatron_patch::cuda
