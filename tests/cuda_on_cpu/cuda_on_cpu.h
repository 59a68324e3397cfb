// Runs CUDA kernels on a CPU, one block at a time, so that tests execute the same files that nvcc compiles on machines without a GPU.
//
// Each thread of a block is a fiber with its own stack. A fiber runs until it reaches a barrier or a shuffle; then the next one runs, in an
// order that the test chooses: forward, backward, shuffled before every round, or one warp at a time until it waits for others. A missing
// barrier shows as a wrong number under one of the orders. Blocks run in an order of the same kind. The blocks of a cluster run together,
// each with its own dynamic shared memory (they would share static shared memory, so a kernel for clusters must not use any). Dynamic
// shared memory is filled with NaN patterns before and after each block. A block that writes past its shared memory ends the kernel; so
// does an unaligned access to a vector, which this processor would permit.
//
// This checks indexing, tails, alignment of vectors, barriers, reductions and the arithmetic in float. It cannot check speed, registers and
// occupancy, races between blocks or between two barriers, the hardware's own exp, or warps that diverge around a shuffle.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 96 * 1024;
constexpr int kWarp = 32;
constexpr size_t kDynamicSharedBytes = 256 * 1024;
constexpr int kMaxParts = 8;

enum class Order { kForward, kBackward, kShuffled, kWarps };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started, done;
  bool waits_for_block, waits_for_warp, waits_for_cluster, waits_for_first, arrived;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  std::vector<std::array<unsigned char, 16>> exchanged;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int current = 0;
  int threads = 0, parts = 1;
  int first = 0;  // number of threads of the barrier for a block's first threads
  size_t shared_bytes = 0;
  std::array<bool, kMaxParts> ended;
  dim3 block, grid;
  unsigned first_block = 0;
  Order order = Order::kForward;
  uint32_t seed = 1;
  int shared_limit = 64 * 1024;
  bool clusters = false;
  bool trapped = false;
  char message[512] = "";
  alignas(16) unsigned char shared[kMaxParts][kDynamicSharedBytes];
};

inline Machine machine;

inline int rank() { return machine.current / machine.threads; }

inline uint3 thread_index() {
  const auto i = static_cast<unsigned>(machine.current % machine.threads);
  return {i % machine.block.x, i / machine.block.x % machine.block.y, i / (machine.block.x * machine.block.y)};
}

inline uint3 block_index() {
  const unsigned n = machine.first_block + static_cast<unsigned>(rank());
  const dim3& grid = machine.grid;
  return {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
}

inline void leave() { _longjmp(machine.scheduler, 1); }

inline void wait() {
  if (_setjmp(machine.fibers[machine.current].place) == 0) leave();
}

inline void entry() {
  machine.kernel();
  machine.fibers[machine.current].done = true;
  leave();
}

inline void block_barrier() {
  machine.fibers[machine.current].waits_for_block = true;
  wait();
}

inline void warp_barrier() {
  machine.fibers[machine.current].waits_for_warp = true;
  wait();
}

// A barrier of a block's first threads only.
inline void barrier_of_first(int threads) {
  machine.first = threads;
  machine.fibers[machine.current].waits_for_first = true;
  wait();
}

inline void cluster_arrive() { machine.fibers[machine.current].arrived = true; }

inline void cluster_wait() {
  machine.fibers[machine.current].waits_for_cluster = true;
  wait();
}

// The address in another block of the cluster that corresponds to `mine`.
inline const void* of_block(const void* mine, unsigned other) {
  return static_cast<const unsigned char*>(mine) + (static_cast<ptrdiff_t>(other) - rank()) * static_cast<ptrdiff_t>(kDynamicSharedBytes);
}

[[noreturn]] inline void trap() {
  machine.trapped = true;
  leave();
  __builtin_unreachable();
}

inline void shuffled(std::vector<int>& numbers) {
  for (size_t i = numbers.size(); i > 1; --i) {
    machine.seed = machine.seed * 1664525u + 1013904223u;
    std::swap(numbers[i - 1], numbers[(machine.seed >> 8) % i]);
  }
}

inline std::vector<int> turns(int count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (machine.order == Order::kBackward) std::reverse(numbers.begin(), numbers.end());
  if (machine.order == Order::kShuffled) shuffled(numbers);
  return numbers;
}

// Opens a barrier if all threads wait at it. Threads that have ended count as arrived, as on a GPU.
inline bool open_if_all_wait(int first, int last, bool Fiber::*waiting) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.done) continue;
    if (!(fiber.*waiting)) return false;
    any = true;
  }
  for (int i = first; any && i < last; ++i) machine.fibers[i].*waiting = false;
  return any;
}

// Opens the barriers of a block: that of all its threads, and that of its first threads.
inline bool open_block(int begin, int end) {
  const bool opened = open_if_all_wait(begin, std::min(begin + machine.first, end), &Fiber::waits_for_first);
  return open_if_all_wait(begin, end, &Fiber::waits_for_block) || opened;
}

// Opens the cluster's barrier when every thread has arrived. Waiting threads then continue, those of other blocks perhaps much later.
inline bool open_cluster(int all) {
  bool any = false;
  for (int i = 0; i < all; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (!fiber.done && !fiber.arrived) return false;
    any = any || fiber.waits_for_cluster;
  }
  bool everyone = true;
  for (int i = 0; i < all; ++i) everyone = everyone && (machine.fibers[i].done || machine.fibers[i].waits_for_cluster);
  if (!any || !everyone) return false;
  for (int i = 0; i < all; ++i) machine.fibers[i].waits_for_cluster = machine.fibers[i].arrived = false;
  return true;
}

// Runs a thread until it waits or ends.
inline void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs each listed thread that does not wait. Returns whether any ran.
inline bool resume_each(const std::vector<int>& threads) {
  bool moved = false;
  for (const int thread : threads) {
    const Fiber& fiber = machine.fibers[thread];
    if (fiber.done || fiber.waits_for_block || fiber.waits_for_warp || fiber.waits_for_cluster || fiber.waits_for_first) continue;
    resume(thread);
    if (machine.trapped) return true;
    moved = true;
  }
  return moved;
}

// Runs the warps of a block one after another up to their next barrier of the block. Returns whether any ran.
inline bool resume_warps(int begin, int end) {
  bool moved = false;
  for (int first = begin; first < end; first += kWarp) {
    const int last = std::min(first + kWarp, end);
    std::vector<int> warp(last - first);
    std::iota(warp.begin(), warp.end(), first);
    while (resume_each(warp) || open_if_all_wait(first, last, &Fiber::waits_for_warp)) {
      if (machine.trapped) return true;
      moved = true;
    }
  }
  return moved;
}

// Checks that a block that has ended wrote only its own shared memory, and clears it, because no other block may read it any more.
inline void end_if_through(int part) {
  const auto begin = machine.fibers.begin() + part * machine.threads;
  if (machine.ended[part] || !std::all_of(begin, begin + machine.threads, [](const Fiber& fiber) { return fiber.done; })) return;
  machine.ended[part] = true;
  unsigned char* shared = machine.shared[part];
  if (std::any_of(shared + machine.shared_bytes, shared + kDynamicSharedBytes, [](unsigned char byte) { return byte != 0xff; })) {
    machine.trapped = true;
    std::snprintf(machine.message, sizeof(machine.message), "the kernel wrote past its %zu bytes of shared memory", machine.shared_bytes);
  }
  std::memset(shared, 0xff, machine.shared_bytes);
}

// Runs the blocks of a cluster one after another until they wait for each other. Returns whether any ran.
inline bool resume_blocks() {
  bool moved = false;
  for (int part = 0; part < machine.parts; ++part) {
    const int begin = part * machine.threads, end = begin + machine.threads;
    while (resume_warps(begin, end) || open_block(begin, end)) {
      if (machine.trapped) return true;
      moved = true;
    }
    end_if_through(part);
  }
  return moved;
}

// Runs one block, or the blocks of one cluster.
inline void run_cluster() {
  const int threads = machine.threads, all = threads * machine.parts;
  for (int i = 0; i < all; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.started = fiber.done = fiber.arrived = false;
    fiber.waits_for_block = fiber.waits_for_warp = fiber.waits_for_cluster = fiber.waits_for_first = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks.get() + static_cast<size_t>(i) * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
  }
  for (int part = 0; part < machine.parts; ++part) std::memset(machine.shared[part], 0xff, kDynamicSharedBytes);
  machine.ended = {};
  while (!std::all_of(machine.fibers.begin(), machine.fibers.begin() + all, [](const Fiber& fiber) { return fiber.done; })) {
    bool moved = machine.order == Order::kWarps ? resume_blocks() : resume_each(turns(all));
    if (machine.trapped) return;
    for (int first = 0; first < all; first += threads) {
      for (int warp = first; warp < first + threads; warp += kWarp) {
        moved |= open_if_all_wait(warp, std::min(warp + kWarp, first + threads), &Fiber::waits_for_warp);
      }
      moved |= open_block(first, first + threads);
    }
    for (int part = 0; part < machine.parts; ++part) end_if_through(part);
    if (machine.trapped) return;
    moved |= open_cluster(all);
    if (!moved) {
      machine.trapped = true;
      std::snprintf(machine.message, sizeof(machine.message), "threads wait for each other at different barriers");
      return;
    }
  }
}

inline void launch(int parts, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
  // A warp must not span two blocks.
  const bool whole_warps = parts == 1 || threads % kWarp == 0;
  const bool whole_clusters = parts <= kMaxParts && blocks % parts == 0;
  if (static_cast<int>(shared_bytes) > machine.shared_limit || threads > 1024 || !whole_clusters || !whole_warps) {
    machine.trapped = true;
    std::snprintf(
        machine.message, sizeof(machine.message), "%d threads and %zu bytes of shared memory, %d blocks in clusters of %d", threads,
        shared_bytes, blocks, parts);
    return;
  }
  machine.threads = threads;
  machine.parts = parts;
  machine.shared_bytes = shared_bytes;
  machine.block = block;
  machine.grid = grid;
  machine.kernel = std::move(kernel);
  const auto all = static_cast<size_t>(threads) * parts;
  if (machine.fibers.size() < all) {
    machine.fibers.resize(all);
    machine.exchanged.resize(all);
    machine.stacks.reset(new char[all * kStackBytes]);  // pages that no thread touches take no memory
  }
  for (const int number : turns(blocks / parts)) {
    machine.first_block = static_cast<unsigned>(number * parts);
    run_cluster();
    if (machine.trapped) return;
  }
}

inline cudaError_t describe(cudaDeviceProp* properties) {
  *properties = {};
  std::strcpy(properties->name, "this processor");
  properties->multiProcessorCount = 1;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(machine.shared_limit);
  return cudaSuccess;
}

inline cudaError_t attribute(int* value, cudaDeviceAttr wanted) {
  *value = wanted == cudaDevAttrClusterLaunch ? machine.clusters : machine.shared_limit;
  return cudaSuccess;
}

template <typename T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 16);
  std::memcpy(machine.exchanged[machine.current].data(), &value, sizeof(T));
  warp_barrier();
  T result;
  std::memcpy(&result, machine.exchanged[machine.current / kWarp * kWarp + lane].data(), sizeof(T));
  warp_barrier();
  return result;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index()
#define blockIdx cuda_on_cpu::block_index()
#define blockDim cuda_on_cpu::machine.block
#define gridDim cuda_on_cpu::machine.grid
#define __syncthreads() cuda_on_cpu::block_barrier()
#define __shfl_xor_sync(mask, value, distance) \
  cuda_on_cpu::from_lane((value), cuda_on_cpu::machine.current % cuda_on_cpu::kWarp ^ (distance))
#define __cluster_barrier_arrive() cuda_on_cpu::cluster_arrive()
#define __cluster_barrier_wait() cuda_on_cpu::cluster_wait()
#define __cluster_map_shared_rank(mine, other) cuda_on_cpu::of_block((mine), (other))
#define __stwb(target, word) (*(target) = (word))

#define MP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(1, (grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define MP_LAUNCH_CLUSTER(kernel, parts, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch((parts), (grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define MP_DYNAMIC_SHARED(bytes) unsigned char* bytes = cuda_on_cpu::machine.shared[cuda_on_cpu::rank()]
#define MP_TRAP(...)                                                                                          \
  do {                                                                                                        \
    std::snprintf(cuda_on_cpu::machine.message, sizeof(cuda_on_cpu::machine.message), __VA_ARGS__);           \
    cuda_on_cpu::trap();                                                                                      \
  } while (false)

// The parts of CUDA's runtime that benchmarks/loss_harness.cu calls for its checks.
#define cudaMalloc(pointer, bytes) \
  ((*(pointer)) = static_cast<std::remove_reference_t<decltype(*(pointer))>>(std::malloc(bytes)), cudaSuccess)
#define cudaFree(pointer) std::free(pointer)
#define cudaMemset(pointer, byte, bytes) (std::memset(static_cast<void*>(pointer), (byte), (bytes)), cudaSuccess)
#define cudaMemcpy(target, source, bytes, kind) (std::memcpy(static_cast<void*>(target), (source), (bytes)), cudaSuccess)
#define cudaDeviceSynchronize() cudaGetLastError()
#define cudaGetErrorString(error) ((void)(error), cuda_on_cpu::machine.message)
#define cudaGetDeviceCount(count) (*(count) = 1, cudaSuccess)
#define cudaGetDeviceProperties(properties, device) cuda_on_cpu::describe((properties))
#define cudaGetLastError() (cuda_on_cpu::machine.trapped ? cudaErrorLaunchFailure : cudaSuccess)
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, wanted, device) ((void)(device), cuda_on_cpu::attribute((value), (wanted)))
#define cudaFuncGetAttributes(code, kernel) ((void)(kernel), (code)->ptxVersion = (code)->binaryVersion = 90, cudaSuccess)
#define cudaFuncSetAttribute(kernel, attribute, value) ((void)(kernel), (void)(value), cudaSuccess)

// A test calls these before and after a launch.
extern "C" {
// With -fsanitize=alignment, the compiler calls this in place of an unaligned access.
inline __attribute__((used, visibility("default"))) void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  std::snprintf(cuda_on_cpu::machine.message, sizeof(cuda_on_cpu::machine.message), "misaligned address %p", address);
  cuda_on_cpu::trap();
}
inline __attribute__((used, visibility("default"))) void cuda_on_cpu_prepare(int order, unsigned seed, int shared_limit, int clusters) {
  auto& machine = cuda_on_cpu::machine;
  machine.order = static_cast<cuda_on_cpu::Order>(order);
  machine.seed = seed;
  machine.shared_limit = shared_limit;
  machine.clusters = clusters != 0;
  machine.trapped = false;
  machine.message[0] = 0;
}
inline __attribute__((used, visibility("default"))) const char* cuda_on_cpu_message() { return cuda_on_cpu::machine.message; }
}
