#include "multi_token_loss.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Compiles a function for several instruction sets; the best one that the processor has is chosen when the library is loaded. All versions
// give the same bits, because they use no fused multiply-add and a fixed number of lanes.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define MP_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MP_EACH_PROCESSOR
#endif
#define MP_INLINE inline __attribute__((always_inline))

namespace megatron_patch {
namespace {

constexpr int kLanes = 32;
// Columns after which the float lanes are added to a double: a float sum over a full vocabulary would lose digits.
constexpr int64_t kBlock = kLanes * 64;

// exp(value - largest), value <= largest, to about one unit in the last place: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2
// (Cephes' coefficients). The rounding error of the difference is added to the rest: at -20 it would cost eight units.
// Without branches, so that the compiler can vectorize it. NaN stays NaN, and results below the smallest normal number are 0.
MP_INLINE float exponential(float value, float largest) {
  const float x = value - largest;
  const float taken = x - value;
  const float lost = (value - (x - taken)) - (largest + taken);  // Knuth's exact difference
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which is then in the low bits
  const float rounded = x * 1.44269504088896341f + shift;
  const float n = rounded - shift;
  const float rest = ((x - n * 0.693359375f) - n * -2.12194440e-4f) + lost;
  float polynomial = 1.9875691500e-4f;
  polynomial = polynomial * rest + 1.3981999507e-3f;
  polynomial = polynomial * rest + 8.3334519073e-3f;
  polynomial = polynomial * rest + 4.1665795894e-2f;
  polynomial = polynomial * rest + 1.6666665459e-1f;
  polynomial = polynomial * rest + 5.0000001201e-1f;
  polynomial = polynomial * (rest * rest) + rest + 1.0f;
  const auto exponent = (std::bit_cast<uint32_t>(rounded) + 127u) << 23;
  return x < -87.0f ? 0.0f : polynomial * std::bit_cast<float>(exponent);
}

MP_INLINE double exponential(double value, double largest) { return std::exp(value - largest); }

template <typename T>
MP_INLINE LossNumber<T> largest_of(const T* __restrict row, int64_t count) {
  using A = LossNumber<T>;
  A lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -std::numeric_limits<A>::infinity();
  int64_t v = 0;
  for (; v + kLanes <= count; v += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const A value = static_cast<A>(row[v + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  }
  for (int lane = 0; v < count; ++v, ++lane) lanes[lane] = std::max(lanes[lane], static_cast<A>(row[v]));
  return *std::max_element(lanes, lanes + kLanes);
}

// The sum of exp(row - largest); the terms are written to `terms` unless it is null.
template <bool kKeep, typename T>
MP_INLINE LossNumber<T> sum_of_exponentials(const T* __restrict row, int64_t count, LossNumber<T> largest, LossNumber<T>* __restrict terms) {
  using A = LossNumber<T>;
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = std::min(count, start + kBlock);
    A lanes[kLanes] = {};
    int64_t v = start;
    for (; v + kLanes <= end; v += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const A term = exponential(static_cast<A>(row[v + lane]), largest);
        lanes[lane] += term;
        if (kKeep) terms[v + lane] = term;
      }
    }
    for (int lane = 0; v < end; ++v, ++lane) {
      const A term = exponential(static_cast<A>(row[v]), largest);
      lanes[lane] += term;
      if (kKeep) terms[v] = term;
    }
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
  }
  return static_cast<A>(total);
}

template <typename T>
MP_INLINE void scaled(const LossNumber<T>* __restrict terms, int64_t count, LossNumber<T> factor, T* __restrict out) {
  for (int64_t v = 0; v < count; ++v) out[v] = static_cast<T>(terms[v] * factor);
}

// `out` can be `row`. A block of lanes is read completely before it is written, so that the compiler can vectorize both loops.
template <typename T>
MP_INLINE void scaled_exponentials(const T* row, int64_t count, LossNumber<T> largest, LossNumber<T> factor, T* out) {
  using A = LossNumber<T>;
  int64_t v = 0;
  for (; v + kLanes <= count; v += kLanes) {
    A lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = exponential(static_cast<A>(row[v + lane]), largest) * factor;
    for (int lane = 0; lane < kLanes; ++lane) out[v + lane] = static_cast<T>(lanes[lane]);
  }
  for (; v < count; ++v) out[v] = static_cast<T>(exponential(static_cast<A>(row[v]), largest) * factor);
}

// One function for each number type, because functions with several instruction sets cannot be templates.
#define FOR_TYPE(T, NAME)                                                                                                              \
  MP_EACH_PROCESSOR LossNumber<T> largest_##NAME(const T* row, int64_t count) { return largest_of<T>(row, count); }                    \
  MP_EACH_PROCESSOR LossNumber<T> sum_##NAME(const T* row, int64_t count, LossNumber<T> largest) {                                     \
    return sum_of_exponentials<false, T>(row, count, largest, nullptr);                                                                \
  }                                                                                                                                    \
  MP_EACH_PROCESSOR LossNumber<T> terms_##NAME(const T* row, int64_t count, LossNumber<T> largest, LossNumber<T>* terms) {             \
    return sum_of_exponentials<true, T>(row, count, largest, terms);                                                                   \
  }                                                                                                                                    \
  MP_EACH_PROCESSOR void scaled_##NAME(const LossNumber<T>* terms, int64_t count, LossNumber<T> factor, T* out) {                      \
    scaled<T>(terms, count, factor, out);                                                                                              \
  }                                                                                                                                    \
  MP_EACH_PROCESSOR void gradient_##NAME(const T* row, int64_t count, LossNumber<T> largest, LossNumber<T> factor, T* out) {           \
    scaled_exponentials<T>(row, count, largest, factor, out);                                                                          \
  }                                                                                                                                    \
  struct Row_##NAME {                                                                                                                  \
    static constexpr auto largest = largest_##NAME;                                                                                    \
    static constexpr auto sum = sum_##NAME;                                                                                            \
    static constexpr auto terms = terms_##NAME;                                                                                        \
    static constexpr auto scaled = scaled_##NAME;                                                                                      \
    static constexpr auto gradient = gradient_##NAME;                                                                                  \
  };                                                                                                                                   \
  Row_##NAME row_functions(const T*) { return {}; }
FOR_TYPE(float, float)
FOR_TYPE(double, double)
FOR_TYPE(c10::BFloat16, bfloat16)
FOR_TYPE(c10::Half, half)
#undef FOR_TYPE

// Calls back once for each column that has labels, with the sum of the weights of these labels.
template <typename A, typename Weight>
void for_each_label_column(const LabelTable& table, int64_t row, const Weight& weight, auto&& use) {
  for (int64_t k = 0; k < table.num_labels; ++k) {
    const int64_t column = table.column(row, k);
    if (column < 0) continue;
    bool repeated = false;
    for (int64_t earlier = 0; earlier < k; ++earlier) repeated = repeated || table.column(row, earlier) == column;
    if (repeated) continue;
    A taken = 0;
    for (int64_t later = k; later < table.num_labels; ++later) {
      if (table.column(row, later) == column) taken += weight(later);
    }
    use(column, taken);
  }
}

}  // namespace

std::pair<int64_t, int64_t> label_range(const LabelTable& table) {
  int64_t lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < table.count(); ++i) {
    const int64_t label = table.labels[i];
    if (label == kIgnoreIndex) continue;
    lowest = std::min(lowest, label);
    highest = std::max(highest, label);
  }
  return lowest <= highest ? std::pair{lowest, highest} : std::pair<int64_t, int64_t>{0, -1};
}

template <typename T>
void loss_statistics(const T* logits, const LabelTable& table, LossNumber<T>* out, int64_t begin, int64_t end) {
  const auto functions = row_functions(logits);
  for (int64_t row = begin; row < end; ++row) {
    const T* source = logits + row * table.vocab;
    LossNumber<T>* target = out + row * (2 + table.num_labels);
    target[0] = functions.largest(source, table.vocab);
    target[1] = functions.sum(source, table.vocab, target[0]);
    for (int64_t k = 0; k < table.num_labels; ++k) {
      const int64_t column = table.column(row, k);
      target[2 + k] = column < 0 ? LossNumber<T>(0) : static_cast<LossNumber<T>>(source[column]);
    }
  }
}

template <typename T>
void loss_gradient(
    const T* logits, const LabelTable& table, const LossNumber<T>* normalizer, const LossNumber<T>* grad_nll,
    const LossNumber<T>* grad_lse, T* out, int64_t begin, int64_t end) {
  using A = LossNumber<T>;
  const auto functions = row_functions(logits);
  std::vector<std::pair<int64_t, T>> at_labels;
  for (int64_t row = begin; row < end; ++row) {
    const T* source = logits + row * table.vocab;
    T* target = out + row * table.vocab;
    const A largest = normalizer[2 * row], sum = normalizer[2 * row + 1];
    const A* weights = grad_nll + row * table.num_labels;
    A factor = grad_lse[row];
    for (int64_t k = 0; k < table.num_labels; ++k) {
      if (table.labels[row * table.num_labels + k] != kIgnoreIndex) factor += weights[k];
    }
    factor /= sum;
    at_labels.clear();  // computed before the row is overwritten, so that each value is rounded once
    for_each_label_column<A>(table, row, [&](int64_t k) { return weights[k]; }, [&](int64_t column, A taken) {
      at_labels.emplace_back(column, static_cast<T>(exponential(static_cast<A>(source[column]), largest) * factor - taken));
    });
    functions.gradient(source, table.vocab, largest, factor, target);
    for (const auto& [column, value] : at_labels) target[column] = value;
  }
}

template <typename T>
void loss_and_gradient(
    T* logits, const LabelTable& table, const LossNumber<T>* weights, LossNumber<T> z_loss, LossNumber<T>* loss, int64_t begin,
    int64_t end) {
  using A = LossNumber<T>;
  const auto functions = row_functions(static_cast<const T*>(logits));
  const auto weight = [&](int64_t k) { return weights == nullptr ? A(1) : weights[k]; };
  std::vector<A> terms(table.vocab);
  for (int64_t row = begin; row < end; ++row) {
    T* target = logits + row * table.vocab;
    A total_weight = 0;
    for (int64_t k = 0; k < table.num_labels; ++k) total_weight += table.column(row, k) < 0 ? A(0) : weight(k);
    const A largest = functions.largest(target, table.vocab);
    const A sum = functions.terms(target, table.vocab, largest, terms.data());
    const A log_sum = std::log(sum), lse = largest + log_sum;
    A total = z_loss * lse * lse * total_weight;
    for (int64_t k = 0; k < table.num_labels; ++k) {
      const int64_t column = table.column(row, k);
      if (column >= 0) total += weight(k) * ((largest - static_cast<A>(target[column])) + log_sum);
    }
    loss[row] = total_weight == A(0) ? A(0) : total;
    const A factor = total_weight == A(0) ? A(0) : total_weight * (A(1) + A(2) * z_loss * lse) / sum;
    functions.scaled(terms.data(), table.vocab, factor, target);
    for_each_label_column<A>(
        table, row, weight, [&](int64_t column, A taken) { target[column] = static_cast<T>(terms[column] * factor - taken); });
  }
}

#define INSTANTIATE(T)                                                                                                              \
  template void loss_statistics<T>(const T*, const LabelTable&, LossNumber<T>*, int64_t, int64_t);                                  \
  template void loss_gradient<T>(                                                                                                   \
      const T*, const LabelTable&, const LossNumber<T>*, const LossNumber<T>*, const LossNumber<T>*, T*, int64_t, int64_t);         \
  template void loss_and_gradient<T>(T*, const LabelTable&, const LossNumber<T>*, LossNumber<T>, LossNumber<T>*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace megatron_patch
