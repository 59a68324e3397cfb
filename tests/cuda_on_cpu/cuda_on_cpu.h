// Runs CUDA kernels on a CPU, one block at a time, so that the very files that nvcc compiles are executed where there is no GPU.
//
// Each thread of a block is a fiber with its own stack. A fiber runs until it meets a barrier or a shuffle; then the next one runs, in an
// order that the test chooses: forward, backward, shuffled anew at every turn, or a warp at a time as far as it gets. What is wrong without
// a barrier shows up as a wrong number under one of the orders. Blocks run in the same order of orders. Shared memory is filled with NaN patterns before each block where it is
// dynamic. A vector read or written off its alignment, which this processor would let pass, ends the kernel.
//
// It shows: indexing, tails, alignment of vectors, barriers, reductions, the arithmetic in float. It cannot show: speed, registers and
// occupancy, races between blocks or finer than a barrier, the hardware's own exp, warps that diverge around a shuffle.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
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

enum class Order { kForward, kBackward, kShuffled, kWarps };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started, done;
  bool waits_for_block, waits_for_warp;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<std::array<unsigned char, 16>> exchanged;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int current = 0;
  dim3 block, grid;
  uint3 block_index;
  Order order = Order::kForward;
  uint32_t seed = 1;
  int shared_limit = 64 * 1024;
  bool trapped = false;
  char message[512] = "";
  alignas(16) unsigned char shared[kDynamicSharedBytes];
};

inline Machine machine;

inline uint3 thread_index() {
  const auto i = static_cast<unsigned>(machine.current);
  return {i % machine.block.x, i / machine.block.x % machine.block.y, i / (machine.block.x * machine.block.y)};
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

// Threads that are through count as arrived, as on a GPU.
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

// Lets a thread run until it waits or is through.
inline void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets those of the listed threads run that do not wait; whether any did.
inline bool resume_each(const std::vector<int>& threads) {
  bool moved = false;
  for (const int thread : threads) {
    const Fiber& fiber = machine.fibers[thread];
    if (fiber.done || fiber.waits_for_block || fiber.waits_for_warp) continue;
    resume(thread);
    if (machine.trapped) return true;
    moved = true;
  }
  return moved;
}

// Lets one warp after the other run up to its next barrier of the block; whether any did.
inline bool resume_warps(int threads) {
  bool moved = false;
  for (int first = 0; first < threads; first += kWarp) {
    const int last = std::min(first + kWarp, threads);
    std::vector<int> warp(last - first);
    std::iota(warp.begin(), warp.end(), first);
    while (resume_each(warp) || open_if_all_wait(first, last, &Fiber::waits_for_warp)) {
      if (machine.trapped) return true;
      moved = true;
    }
  }
  return moved;
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.started = fiber.done = fiber.waits_for_block = fiber.waits_for_warp = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks.data() + static_cast<size_t>(i) * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
  }
  std::memset(machine.shared, 0xff, sizeof(machine.shared));
  const auto through = [](const Fiber& fiber) { return fiber.done; };
  while (!std::all_of(machine.fibers.begin(), machine.fibers.begin() + threads, through)) {
    bool moved = machine.order == Order::kWarps ? resume_warps(threads) : resume_each(turns(threads));
    if (machine.trapped) return;
    for (int first = 0; first < threads; first += kWarp) {
      moved |= open_if_all_wait(first, std::min(first + kWarp, threads), &Fiber::waits_for_warp);
    }
    moved |= open_if_all_wait(0, threads, &Fiber::waits_for_block);
    if (!moved) {
      machine.trapped = true;
      std::snprintf(machine.message, sizeof(machine.message), "threads wait for each other at different barriers");
      return;
    }
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (static_cast<int>(shared_bytes) > machine.shared_limit || threads > 1024) {
    machine.trapped = true;
    std::snprintf(machine.message, sizeof(machine.message), "%d threads and %zu bytes of shared memory", threads, shared_bytes);
    return;
  }
  machine.block = block;
  machine.grid = grid;
  machine.kernel = std::move(kernel);
  if (machine.fibers.size() < static_cast<size_t>(threads)) {
    machine.fibers.resize(threads);
    machine.exchanged.resize(threads);
    machine.stacks.resize(threads * kStackBytes);
  }
  for (const int number : turns(static_cast<int>(grid.x * grid.y * grid.z))) {
    const auto n = static_cast<unsigned>(number);
    machine.block_index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
    run_block(threads);
    if (machine.trapped) return;
  }
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
#define blockIdx cuda_on_cpu::machine.block_index
#define blockDim cuda_on_cpu::machine.block
#define gridDim cuda_on_cpu::machine.grid
#define __syncthreads() cuda_on_cpu::block_barrier()
#define __shfl_xor_sync(mask, value, distance) \
  cuda_on_cpu::from_lane((value), cuda_on_cpu::machine.current % cuda_on_cpu::kWarp ^ (distance))
#define __expf(x) expf(x)
#define __stwb(target, word) (*(target) = (word))

#define MP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch((grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define MP_DYNAMIC_SHARED(bytes) unsigned char* bytes = cuda_on_cpu::machine.shared
#define MP_TRAP(...)                                                                                          \
  do {                                                                                                        \
    std::snprintf(cuda_on_cpu::machine.message, sizeof(cuda_on_cpu::machine.message), __VA_ARGS__);           \
    cuda_on_cpu::trap();                                                                                      \
  } while (false)

#define cudaGetLastError() (cuda_on_cpu::machine.trapped ? cudaErrorLaunchFailure : cudaSuccess)
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, attribute, device) ((void)(device), *(value) = cuda_on_cpu::machine.shared_limit, cudaSuccess)
#define cudaFuncSetAttribute(kernel, attribute, value) ((void)(kernel), (void)(value), cudaSuccess)

// What a test sets before a launch and asks behind it.
extern "C" {
// The compiler calls it, with -fsanitize=alignment, in place of an access that is off its alignment.
inline __attribute__((used, visibility("default"))) void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  std::snprintf(cuda_on_cpu::machine.message, sizeof(cuda_on_cpu::machine.message), "misaligned address %p", address);
  cuda_on_cpu::trap();
}
inline __attribute__((used, visibility("default"))) void cuda_on_cpu_prepare(int order, unsigned seed, int shared_limit) {
  auto& machine = cuda_on_cpu::machine;
  machine.order = static_cast<cuda_on_cpu::Order>(order);
  machine.seed = seed;
  machine.shared_limit = shared_limit;
  machine.trapped = false;
  machine.message[0] = 0;
}
inline __attribute__((used, visibility("default"))) const char* cuda_on_cpu_message() { return cuda_on_cpu::machine.message; }
}
