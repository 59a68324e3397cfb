// Shared by all kernels: number types, 16-byte vectors over rows of any alignment, sums in a fixed order, launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef MEGATRON_PATCH_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cstdio>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define MP_LAUNCH_CLUSTER(...) megatron_patch::cuda::launch_cluster(__VA_ARGS__)
#define MP_DYNAMIC_SHARED(bytes) extern __shared__ __align__(16) unsigned char bytes[]
#define MP_TRAP(...)       \
  do {                     \
    printf(__VA_ARGS__);   \
    __trap();              \
  } while (false)
#endif

#include "launch.h"

namespace megatron_patch::cuda {

constexpr int kWarp = 32;

// The type in which numbers of type T are summed.
template <typename T>
using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Constants, because device code cannot call the functions of std::numeric_limits.
template <typename A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T narrow(Number<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else return value;
}

// Two 16-bit numbers in one register, which the hardware converts in one instruction.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  // Each is the upper half of a float. The intrinsic would need two instructions for the second number.
  static __device__ __forceinline__ float2 widen(type pair) {
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    const uint32_t halves[2] = {bits << 16, bits & 0xffff0000u};
    float2 both;
    memcpy(&both, halves, sizeof(both));
    return both;
  }
  static __device__ __forceinline__ type narrow(float2 pair) { return __float22bfloat162_rn(pair); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ float2 widen(type pair) { return __half22float2(pair); }
  static __device__ __forceinline__ type narrow(float2 pair) { return __float22half2_rn(pair); }
};

__device__ __forceinline__ float larger(float one, float other) { return fmaxf(one, other); }
__device__ __forceinline__ double larger(double one, double other) { return fmax(one, other); }

// Reads threadIdx.x again, so that the compiler need not keep it, or values derived from it, in registers through a loop.
__device__ __forceinline__ int reread_thread_index() {
#ifdef MEGATRON_PATCH_CUDA_ON_CPU
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// A barrier of the block's first `kThreads` threads only; kThreads is a multiple of the warp size.
template <int kThreads>
__device__ __forceinline__ void sync_first() {
#ifdef MEGATRON_PATCH_CUDA_ON_CPU
  cuda_on_cpu::barrier_of_first(kThreads);
#else
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
#endif
}

// 2^x, by one instruction on a GPU; results below 2^-126 are 0.
#ifdef MEGATRON_PATCH_CUDA_ON_CPU
inline float power_of_two(float x) { return exp2f(x); }
#else
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#endif

// exp(value - shift). For float, the rounding error of the difference is added back (Knuth's exact difference): at -20 it would cost eight
// units in the last place. For 16-bit types, whose results are rounded anyway, the hardware's approximation is enough. The difference is
// computed before the multiplication, because it is exact near the largest logit, where most of the sum comes from.
template <typename T>
__device__ __forceinline__ Number<T> exponential(Number<T> value, Number<T> shift) {
  const Number<T> difference = value - shift;
  if constexpr (std::is_same_v<T, double>) {
    return exp(difference);
  } else if constexpr (std::is_same_v<T, float>) {
    const float taken = difference - value;
    const float lost = (value - (difference - taken)) - (shift + taken);
    const float result = expf(difference);
    return result == 0.0f ? result : result + result * lost;
  } else {
    constexpr float log2_of_e = 1.44269504f;
    return power_of_two(difference * log2_of_e);
  }
}

__device__ __forceinline__ float logarithm(float value) { return logf(value); }
__device__ __forceinline__ double logarithm(double value) { return log(value); }

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

template <typename T>
using Wide = Vector<T, kVectorWidth<T>>;

// Converts all numbers of a vector to the type of sums, and back.
template <typename T>
__device__ __forceinline__ void widen_vector(const Wide<T>& vector, Number<T>* numbers) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kVectorWidth<T>; j += 2) {
      typename Pair<T>::type pair;
      memcpy(static_cast<void*>(&pair), vector.values + j, sizeof(pair));
      const float2 both = Pair<T>::widen(pair);
      numbers[j] = both.x;
      numbers[j + 1] = both.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectorWidth<T>; ++j) numbers[j] = vector.values[j];
  }
}

template <typename T>
__device__ __forceinline__ Wide<T> narrow_vector(const Number<T>* numbers) {
  Wide<T> vector;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kVectorWidth<T>; j += 2) {
      const auto pair = Pair<T>::narrow(float2{numbers[j], numbers[j + 1]});
      memcpy(static_cast<void*>(vector.values + j), &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectorWidth<T>; ++j) vector.values[j] = numbers[j];
  }
  return vector;
}

// How a row is split so that its vectors are aligned: columns [0, head) and [head + vectors * width, count) are processed one by one.
struct RowCut {
  int head;
  int vectors;
};

template <typename T>
__device__ __forceinline__ RowCut cut_row(const T* row, int count) {
  const auto offset = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
  int head = offset == 0 ? 0 : (16 - offset) / static_cast<int>(sizeof(T));
  if (head > count) head = count;
  return {head, (count - head) / kVectorWidth<T>};
}

// A word that one instruction loads or stores. The compiler may split an assignment into stores of 2 bytes; __stwb it cannot split.
template <int kBytes>
struct Word;
template <>
struct Word<2> { using type = uint16_t; };
template <>
struct Word<4> { using type = uint32_t; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<16> { using type = uint4; };

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load_vector(const T* source) {
  const auto word = *reinterpret_cast<const typename Word<sizeof(T) * kWidth>::type*>(source);
  Vector<T, kWidth> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}

template <int kWidth, typename T>
__device__ __forceinline__ void store_vector(T* target, const Vector<T, kWidth>& vector) {
  typename Word<sizeof(T) * kWidth>::type word;
  memcpy(&word, &vector, sizeof(word));
  __stwb(reinterpret_cast<decltype(word)*>(target), word);
}

// Loads and stores the adjacent sums of one thread, in pieces of at most 16 bytes.
template <typename A, int kWidth>
constexpr int kPiece = kWidth < kVectorWidth<A> ? kWidth : kVectorWidth<A>;

template <int kWidth, typename A>
__device__ __forceinline__ void store_sums(A* target, const A* sums) {
  constexpr int piece = kPiece<A, kWidth>;
#pragma unroll
  for (int start = 0; start < kWidth; start += piece) {
    Vector<A, piece> vector;
#pragma unroll
    for (int j = 0; j < piece; ++j) vector.values[j] = sums[start + j];
    store_vector<piece>(target + start, vector);
  }
}

template <int kWidth, typename A>
__device__ __forceinline__ void add_sums(A* sums, const A* source) {
  constexpr int piece = kPiece<A, kWidth>;
#pragma unroll
  for (int start = 0; start < kWidth; start += piece) {
    const auto vector = load_vector<piece>(source + start);
#pragma unroll
    for (int j = 0; j < piece; ++j) sums[start + j] += vector.values[j];
  }
}

// Clusters of blocks (sm_90 and later): a barrier in two halves, and access to another block's shared memory.
#if defined(MEGATRON_PATCH_CUDA_ON_CPU) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MP_CLUSTERS
#endif

__device__ __forceinline__ void cluster_arrive() {
#ifdef MP_CLUSTERS
  __cluster_barrier_arrive();
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef MP_CLUSTERS
  __cluster_barrier_wait();
#else
  __trap();
#endif
}

template <typename X>
__device__ __forceinline__ const X* of_block(const X* mine, int rank) {
#ifdef MP_CLUSTERS
  return static_cast<const X*>(__cluster_map_shared_rank(mine, static_cast<unsigned>(rank)));
#else
  return mine + rank;
#endif
}

#ifndef MEGATRON_PATCH_CUDA_ON_CPU
// Launches a kernel whose blocks form clusters of `parts` blocks; 1 is an ordinary launch.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_cluster(
    void (*kernel)(Parameters...), int parts, dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(parts), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

// Whether a grid can have this many blocks. The launch would truncate a larger number to 32 bits and leave most of the work undone.
inline bool fits_grid(int64_t blocks) { return blocks <= std::numeric_limits<int32_t>::max(); }

// Calls `run` with a null pointer of the number type, which selects the template.
template <typename Run>
cudaError_t dispatch(NumberType type, const Run& run) {
  switch (type) {
    case NumberType::kFloat: return run(static_cast<float*>(nullptr));
    case NumberType::kDouble: return run(static_cast<double*>(nullptr));
    case NumberType::kBFloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
    case NumberType::kHalf: return run(static_cast<__half*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace megatron_patch::cuda
