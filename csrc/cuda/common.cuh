// What all kernels share: number types, 16-byte vectors over rows of any alignment, reductions in a fixed order, the launch itself.
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
constexpr int kMostWarps = 32;

// What sums over numbers of a type are taken in.
template <typename T>
using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Device code may use a constant, and not the function that it comes from.
template <typename A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();
constexpr int64_t kNoId = std::numeric_limits<int64_t>::min();

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

// exp(value - shift). In float what the difference loses to rounding is put back (Knuth's exact difference): at -20 it would cost eight units
// in the last place. Where the result is rounded to 16 bits anyway, the hardware's approximation will do.
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
    return __expf(difference);
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

// How a row is cut so that its vectors are aligned: [0, head) and [head + vectors * width, count) element by element.
struct RowCut {
  int64_t head;
  int64_t vectors;
};

template <typename T>
__device__ __forceinline__ RowCut cut_row(const T* row, int64_t count) {
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16);
  int64_t head = offset == 0 ? 0 : (16 - offset) / static_cast<int64_t>(sizeof(T));
  if (head > count) head = count;
  return {head, (count - head) / kVectorWidth<T>};
}

// What goes through memory in one instruction. An assignment the compiler may cut into numbers again, 2 bytes a store; __stwb it may not.
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

// Sums beside each other, as many as a thread owns: in pieces of at most 16 bytes.
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

// Sum over a block, in an order that the block's size alone decides; every thread gets it. `scratch` holds kMostWarps numbers and is free
// again at the return.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  A total = 0;
  for (int other = 0; other < warps; ++other) total += scratch[other];
  __syncthreads();
  return total;
}

// The device's limit of shared memory a block may ask for.
inline cudaError_t shared_memory_limit(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Whether a grid can have so many blocks: more would be cut to 32 bits, and most of the work left undone.
inline bool fits_grid(int64_t blocks) { return blocks <= std::numeric_limits<int32_t>::max(); }

// Calls `run` with a null pointer of the number type.
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
