// The loss kernels by themselves, without torch: are they right on this GPU, and how near the copy limit?
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -I csrc/cuda benchmarks/loss_harness.cu -o loss_harness && ./loss_harness
//
// First rows are compared with float64 on the host: loss, gradient and statistics, bit for bit the same when run again, nothing written
// outside of what was asked. Exit code 1 if anything is wrong, 2 without a GPU. Then the kernels are timed against a copy of
// the same bytes. Each figure is a JSON line on the console, and in the file that FIGURES names.
//   --check-only   no times
//   --time-only    no checks
//   --small        few and short rows, for compute-sanitizer
//   --brief        times in bfloat16 alone
//   --by-size      rows stay where their size says, nowhere else
//   --variant NAME what the figures are called
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

// Where rows stay is chosen anew for each run.
static int residence = 0;
#define MP_LOSS_RESIDENCE residence
#include "multi_token_loss.cu"

using megatron_patch::cuda::NumberType;

namespace {

#define CHECK(call)                                                                                             \
  do {                                                                                                          \
    const cudaError_t error_ = (call);                                                                          \
    if (error_ != cudaSuccess) {                                                                                \
      std::fprintf(stderr, "loss_harness.cu:%d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error_));        \
      std::exit(1);                                                                                             \
    }                                                                                                           \
  } while (false)

struct Options {
  bool check = true, time = true, small = false, brief = false, by_size = false;
  std::string variant = "default";
};

struct Residence {
  const char* name;
  int code;
};
constexpr Residence kResidences[] = {{"by size", 0}, {"half", -1}, {"whole", -2}, {"2 blocks", 2}, {"4 blocks", 4}, {"8 blocks", 8}};

template <typename T>
struct Named;
template <>
struct Named<float> {
  static constexpr const char* name = "float32";
  static constexpr NumberType type = NumberType::kFloat;
  static constexpr double epsilon = 1.2e-7, least = 2e-38;
};
template <>
struct Named<__nv_bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr NumberType type = NumberType::kBFloat16;
  static constexpr double epsilon = 1.0 / 128, least = 2e-38;
};
template <>
struct Named<__half> {
  static constexpr const char* name = "float16";
  static constexpr NumberType type = NumberType::kHalf;
  static constexpr double epsilon = 1.0 / 1024, least = 6e-8;
};

template <typename T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(value);
  else if constexpr (std::is_same_v<T, __half>) return __float2half(value);
  else return value;
}

template <typename T>
double widened(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
  else if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  else return value;
}

// Memory of the device, filled with 0xff: NaN in every type, or -1.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    CHECK(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)));
    poison();
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { put(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void poison() { CHECK(cudaMemset(data_, 0xff, count_ * sizeof(T))); }
  void put(const std::vector<T>& values) { CHECK(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice)); }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

int wrong = 0;
double worst = 0;

void compare(const char* what, const char* dtype, int64_t vocab, int64_t k, const char* where, double found, double exact, double allowed) {
  const double error = std::abs(found - exact);
  if (error <= allowed) {
    worst = std::max(worst, error / allowed);
    return;
  }
  if (++wrong <= 20) {
    std::fprintf(
        stderr, "WRONG: %s, %s, V = %lld, K = %lld, %s: %.9g, not %.9g (%.2g allowed)\n", what, dtype, static_cast<long long>(vocab),
        static_cast<long long>(k), where, found, exact, allowed);
  }
}

// Rows of logits on the host, with gaps between them, and their softmax in float64.
template <typename T>
struct Rows {
  int64_t rows, vocab, stride, shift;
  std::vector<T> logits;
  std::vector<double> probability, largest, sum;

  Rows(int64_t rows, int64_t vocab, int64_t gap, int64_t shift)
      : rows(rows), vocab(vocab), stride(vocab + gap), shift(shift), logits(rows * (vocab + gap) + shift), probability(rows * vocab),
        largest(rows, -INFINITY), sum(rows) {
    Random random(static_cast<uint64_t>(vocab + gap));
    std::memset(static_cast<void*>(logits.data()), 0xff, logits.size() * sizeof(T));
    for (int64_t r = 0; r < rows; ++r) {
      // The second row is as peaked as a trained model's, the third lies far from zero.
      const double scale = r == 1 ? 8 : 2, offset = r == 2 ? 100 : 0;
      for (int64_t v = 0; v < vocab; ++v) {
        T& logit = at(r, v);
        logit = rounded<T>(static_cast<float>(scale * random.normal() + offset));
        largest[r] = std::max(largest[r], widened(logit));
      }
      for (int64_t v = 0; v < vocab; ++v) sum[r] += probability[r * vocab + v] = std::exp(widened(at(r, v)) - largest[r]);
      for (int64_t v = 0; v < vocab; ++v) probability[r * vocab + v] /= sum[r];
    }
  }
  T& at(int64_t r, int64_t v) { return logits[shift + r * stride + v]; }
  double lse(int64_t r) const { return largest[r] + std::log(sum[r]); }
};

template <typename T>
void check_rows(Rows<T>& rows, int64_t k) {
  using Name = Named<T>;
  constexpr double z_loss = 1e-3;
  Random random(static_cast<uint64_t>(k));
  // Repeated labels, some that are not scored, the first and the last column, and a row without any.
  std::vector<int64_t> labels(rows.rows * k);
  std::vector<float> weights(rows.rows * k), lse_gradient(rows.rows);
  for (int64_t i = 0; i < rows.rows * k; ++i) {
    const int64_t j = i % k, r = i / k;
    labels[i] = static_cast<int64_t>(random.next() % static_cast<uint64_t>(rows.vocab));
    if (j == 0) labels[i] = r == 0 ? rows.vocab - 1 : r == 1 && k == 1 ? -100 : 0;
    if (j == 1 || j == 5) labels[i] = labels[i - 1];
    if (j == 3) labels[i] = -100;
    weights[i] = static_cast<float>(0.5 + random.uniform());
  }
  for (auto& each : lse_gradient) each = static_cast<float>(random.normal());
  const Buffer<int64_t> on_device(labels);
  const Buffer<float> device_weights(weights);

  // In one go a label's weight depends on its place in the row alone; otherwise on the row, too, and lse has a gradient of its own.
  const auto gradient_is = [&](const char* what, const char* where, const std::vector<T>& found, int64_t stride, int64_t shift, double z,
                               bool with_lse) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      const float* mine = weights.data() + (with_lse ? r * k : 0);
      double total = 0;
      for (int64_t j = 0; j < k; ++j) total += labels[r * k + j] == -100 ? 0 : mine[j];
      const double factor = total * (1 + 2 * z * rows.lse(r)) + (with_lse ? lse_gradient[r] : 0);
      const double size = std::abs(total) * (1 + 2 * z * std::abs(rows.lse(r))) + (with_lse ? std::abs(lse_gradient[r]) : 0);
      for (int64_t v = 0; v < rows.vocab; ++v) {
        const double p = rows.probability[r * rows.vocab + v];
        double exact = p * factor, taken = 0;
        for (int64_t j = 0; j < k; ++j) taken += labels[r * k + j] == v ? mine[j] : 0;
        exact -= taken;
        const double allowed = 0.51 * Name::epsilon * std::abs(exact) + 4e-6 * (p * size + taken) + Name::least;
        compare(what, Name::name, rows.vocab, k, where, widened(found[shift + r * stride + v]), exact, allowed);
      }
    }
  };
  const auto outside_is_whole = [&](const char* what, const char* where, const std::vector<T>& found, int64_t stride, int64_t shift) {
    for (size_t i = 0; i < found.size(); ++i) {
      const int64_t place = static_cast<int64_t>(i) - shift;
      if (place >= 0 && place % stride < rows.vocab) continue;
      uint16_t bits;
      std::memcpy(&bits, &found[i], sizeof(bits));
      compare(what, Name::name, rows.vocab, k, where, bits, 0xffff, 0);
    }
  };

  // In one go, in place, wherever the row stays.
  for (const Residence& each : kResidences) {
    residence = each.code;
    std::vector<T> before;
    for (int again = 0; again < 2; ++again) {
      const Buffer<T> logits(rows.logits);
      const Buffer<float> losses(rows.rows);
      const cudaError_t error = megatron_patch::cuda::mp_loss_and_gradient(
          Name::type, logits.data() + rows.shift, rows.stride, on_device.data(), rows.rows, k, rows.vocab, device_weights.data(), z_loss,
          losses.data(), nullptr);
      CHECK(error);
      CHECK(cudaDeviceSynchronize());
      const auto found = logits.get();
      if (again == 1) {
        const int differ = std::memcmp(found.data(), before.data(), found.size() * sizeof(T));
        compare("the same bits again", Name::name, rows.vocab, k, each.name, differ, 0, 0);
        continue;
      }
      before = found;
      gradient_is("gradient in one go", each.name, found, rows.stride, rows.shift, z_loss, false);
      outside_is_whole("outside of the rows", each.name, found, rows.stride, rows.shift);
      const auto loss = losses.get();
      for (int64_t r = 0; r < rows.rows; ++r) {
        double exact = 0, total = 0;
        for (int64_t j = 0; j < k; ++j) {
          if (labels[r * k + j] == -100) continue;
          total += weights[j];
          exact += weights[j] * (rows.lse(r) - widened(rows.at(r, labels[r * k + j])));
        }
        exact += total * z_loss * rows.lse(r) * rows.lse(r);
        compare("loss", Name::name, rows.vocab, k, each.name, loss[r], exact, 4e-6 * (std::abs(exact) + total));
      }
    }
  }
  residence = 0;

  // Statistics, and the gradient from them: in place, and into a result of another alignment.
  const Buffer<T> logits(rows.logits);
  const Buffer<float> statistics(rows.rows * (2 + k));
  CHECK(megatron_patch::cuda::mp_loss_statistics(
      Name::type, logits.data() + rows.shift, rows.stride, on_device.data(), rows.rows, k, 0, rows.vocab, true, statistics.data(), nullptr));
  CHECK(cudaDeviceSynchronize());
  const auto found = statistics.get();
  std::vector<float> normalizer(2 * rows.rows);
  for (int64_t r = 0; r < rows.rows; ++r) {
    const float* row = found.data() + r * (2 + k);
    compare("largest", Name::name, rows.vocab, k, "statistics", row[0], rows.largest[r], 0);
    compare("sum", Name::name, rows.vocab, k, "statistics", row[1], rows.sum[r], 4e-6 * rows.sum[r]);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t label = labels[r * k + j];
      compare("logit", Name::name, rows.vocab, k, "statistics", row[2 + j], label == -100 ? 0 : widened(rows.at(r, label)), 0);
    }
    normalizer[2 * r] = row[0];
    normalizer[2 * r + 1] = row[1];
  }
  const Buffer<float> device_normalizer(normalizer), device_lse(lse_gradient);
  const auto gradient = [&](T* out, int64_t stride) {
    CHECK(megatron_patch::cuda::mp_loss_gradient(
        Name::type, logits.data() + rows.shift, rows.stride, on_device.data(), rows.rows, k, 0, rows.vocab, device_normalizer.data(),
        device_weights.data(), device_lse.data(), out, stride, nullptr));
    CHECK(cudaDeviceSynchronize());
  };
  const int64_t odd = rows.vocab + 5;
  const Buffer<T> apart(rows.rows * odd + 3);
  gradient(apart.data() + 3, odd);
  gradient_is("gradient", "into another place", apart.get(), odd, 3, 0, true);
  outside_is_whole("outside of the result", "into another place", apart.get(), odd, 3);
  gradient(logits.data() + rows.shift, rows.stride);
  gradient_is("gradient", "in place", logits.get(), rows.stride, rows.shift, 0, true);
  outside_is_whole("outside of the rows", "in place", logits.get(), rows.stride, rows.shift);
}

template <typename T>
void check_type(const Options& options) {
  std::vector<int64_t> vocabs = {1, 9, 32'000, 50'257, 128'256};
  if (options.small) vocabs = {9, 4100, 50'257};
  for (const int64_t vocab : vocabs) {
    for (const int64_t gap : {int64_t{0}, int64_t{3}}) {
      if (options.small && (gap == 0) != (vocab == 4100)) continue;
      Rows<T> rows(options.small ? 2 : 3, vocab, gap, gap == 0 ? 0 : 1);
      for (const int64_t k : options.small ? std::vector<int64_t>{6} : std::vector<int64_t>{1, 4, 8}) check_rows<T>(rows, k);
    }
  }
}

#ifndef MEGATRON_PATCH_CUDA_ON_CPU  // times are a GPU's alone

// One figure: a JSON line on the console and in FIGURES, written out at once.
void record(
    const std::string& variant, const char* operation, int64_t rows, int64_t vocab, int64_t k, const char* dtype, double ms, double bytes,
    const char* error) {
  char number[64] = "null", speed[64] = "null", line[1024];
  if (error == nullptr) {
    std::snprintf(number, sizeof(number), "%.6f", ms);
    std::snprintf(speed, sizeof(speed), "%.2f", bytes / ms / 1e6);
  }
  const char* step = std::getenv("STEP");
  const std::string named = step == nullptr ? "null" : "\"" + std::string(step) + "\"";
  const std::string failed = error == nullptr ? "null" : "\"" + std::string(error) + "\"";
  std::snprintf(
      line, sizeof(line),
      "{\"kind\": \"harness\", \"step\": %s, \"variant\": \"%s\", \"operator\": \"%s\", \"rows\": %lld, \"vocab\": %lld, \"patch_size\": %lld, "
      "\"dtype\": \"%s\", \"ms\": %s, \"gb_per_second\": %s, \"error\": %s}\n",
      named.c_str(), variant.c_str(), operation, static_cast<long long>(rows), static_cast<long long>(vocab), static_cast<long long>(k), dtype,
      number, speed, failed.c_str());
  std::fputs(line, stdout);
  std::fflush(stdout);
  if (const char* path = std::getenv("FIGURES")) {
    if (FILE* file = std::fopen(path, "a")) {
      std::fputs(line, file);
      std::fclose(file);
    }
  }
}

template <typename T>
__global__ void fill_kernel(T* logits, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    uint64_t bits = i * 0x9e3779b97f4a7c15u;
    bits ^= bits >> 29;
    const float value = static_cast<float>(bits % 65536) / 8192.0f - 4.0f;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) logits[i] = __float2bfloat16(value);
    else if constexpr (std::is_same_v<T, __half>) logits[i] = __float2half(value);
    else logits[i] = value;
  }
}

constexpr int64_t kRows = 8192;
constexpr size_t kArena = size_t{4608} << 20, kFlush = size_t{256} << 20;

// What all times share: room for logits, in which runs take turns, and a write that empties the cache.
class Stopwatch {
 public:
  Stopwatch() : arena(kArena), flush_(kFlush) {
    for (int i = 0; i < kRounds; ++i) {
      CHECK(cudaEventCreate(&began_[i]));
      CHECK(cudaEventCreate(&ended_[i]));
    }
  }

  // Median of the milliseconds of `run(round)`; the first error, if any.
  template <typename Run>
  cudaError_t median(const Run& run, double* ms) {
    for (int round = -2; round < kRounds; ++round) {
      CHECK(cudaMemsetAsync(flush_.data(), round & 1, kFlush));
      if (round >= 0) CHECK(cudaEventRecord(began_[round]));
      const cudaError_t error = run(round + 2);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
      }
      if (round >= 0) CHECK(cudaEventRecord(ended_[round]));
    }
    CHECK(cudaDeviceSynchronize());
    std::vector<float> times(kRounds);
    for (int i = 0; i < kRounds; ++i) CHECK(cudaEventElapsedTime(&times[i], began_[i], ended_[i]));
    std::sort(times.begin(), times.end());
    *ms = times[kRounds / 2];
    return cudaSuccess;
  }

  Buffer<unsigned char> arena;

 private:
  static constexpr int kRounds = 21;
  Buffer<unsigned char> flush_;
  cudaEvent_t began_[kRounds], ended_[kRounds];
};

template <typename T>
void time_shape(Stopwatch& watch, const Options& options, int64_t vocab, const std::vector<int64_t>& patch_sizes, bool all) {
  using Name = Named<T>;
  const size_t count = static_cast<size_t>(kRows * vocab);
  const double bytes = static_cast<double>(count * sizeof(T));
  T* const arena = reinterpret_cast<T*>(watch.arena.data());
  const size_t buffers = kArena / sizeof(T) / count;
  const auto buffer = [&](int round) { return arena + round % buffers * count; };
  fill_kernel<T><<<4096, 256>>>(arena, kArena / sizeof(T));
  CHECK(cudaGetLastError());
  const auto timed = [&](const std::string& variant, const char* operation, int64_t k, double moved, const auto& run) {
    double ms = 0;
    const cudaError_t error = watch.median(run, &ms);
    record(variant, operation, kRows, vocab, k, Name::name, ms, moved, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
  };
  if (all) {
    // The ceiling: as many bytes read and written.
    const size_t half = std::min<size_t>(count * sizeof(T), kArena / 2 / 256 * 256);
    timed(options.variant, "copy", 0, 2.0 * half, [&](int round) {
      unsigned char* base = watch.arena.data();
      return cudaMemcpyAsync(base + (round & 1 ? half : 0), base + (round & 1 ? 0 : half), half, cudaMemcpyDeviceToDevice);
    });
  }
  for (const int64_t k : patch_sizes) {
    std::vector<int64_t> labels(kRows * k);
    Random random(7);
    for (auto& label : labels) label = static_cast<int64_t>(random.next() % static_cast<uint64_t>(vocab));
    const Buffer<int64_t> on_device(labels);
    const Buffer<float> losses(kRows), statistics(kRows * (2 + k));
    // Gradients that stay small when they are taken for logits again.
    const Buffer<float> normalizer(std::vector<float>(kRows * 2, 10.0f)), weights(std::vector<float>(kRows * k, 1.0f)),
        lse_gradient(std::vector<float>(kRows, 0.0f));
    for (const Residence& each : kResidences) {
      if (each.code != 0 && (!all || k != 4 || options.by_size)) continue;
      residence = each.code;
      timed(options.variant + ", " + each.name, "loss_and_gradient", k, 2 * bytes, [&](int round) {
        return megatron_patch::cuda::mp_loss_and_gradient(
            Name::type, buffer(round), vocab, on_device.data(), kRows, k, vocab, nullptr, 0.0, losses.data(), nullptr);
      });
    }
    residence = 0;
    const auto read = [&](int round) {
      return megatron_patch::cuda::mp_loss_statistics(
          Name::type, buffer(round), vocab, on_device.data(), kRows, k, 0, vocab, true, statistics.data(), nullptr);
    };
    const auto write = [&](int round) {
      return megatron_patch::cuda::mp_loss_gradient(
          Name::type, buffer(round), vocab, on_device.data(), kRows, k, 0, vocab, normalizer.data(), weights.data(), lse_gradient.data(),
          buffer(round), vocab, nullptr);
    };
    if (k != 4) continue;
    timed(options.variant, "statistics", k, bytes, read);
    timed(options.variant, "gradient", k, 2 * bytes, write);
    timed(options.variant, "statistics_then_gradient", k, 3 * bytes, [&](int round) {
      const cudaError_t error = read(round);
      return error != cudaSuccess ? error : write(round);
    });
  }
}

#endif

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--check-only") options.time = false;
    else if (word == "--time-only") options.check = false;
    else if (word == "--small") options.small = true;
    else if (word == "--brief") options.brief = true;
    else if (word == "--by-size") options.by_size = true;
    else if (word == "--variant" && i + 1 < argc) options.variant = argv[++i];
    else {
      std::fprintf(stderr, "loss_harness: unknown: %s\n", word.c_str());
      return 2;
    }
  }
  int devices = 0;
  const cudaError_t none = cudaGetDeviceCount(&devices);
  if (none != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "loss_harness: there is no CUDA device (%s)\n", none == cudaSuccess ? "none found" : cudaGetErrorString(none));
    return 2;
  }
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf(
      "%s, %d processors, %zu bytes of shared memory a block, %s\n", device.name, device.multiProcessorCount, device.sharedMemPerBlockOptin,
      options.variant.c_str());
  std::fflush(stdout);
  if (options.check) {
    check_type<__nv_bfloat16>(options);
    check_type<__half>(options);
    check_type<float>(options);
    std::printf("checks: %d wrong; the largest error is %.2f of what is allowed\n", wrong, worst);
    std::fflush(stdout);
    if (wrong > 0) return 1;
  }
#ifndef MEGATRON_PATCH_CUDA_ON_CPU
  if (options.time) {
    Stopwatch watch;
    time_shape<__nv_bfloat16>(watch, options, 32'000, {4, 1, 8}, true);
    time_shape<__nv_bfloat16>(watch, options, 128'256, {4, 1, 8}, true);
    if (!options.brief) {
      time_shape<__half>(watch, options, 32'000, {4}, false);
      time_shape<float>(watch, options, 32'000, {4}, true);
    }
  }
#endif
  return 0;
}
