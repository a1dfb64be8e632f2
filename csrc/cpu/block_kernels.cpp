#include "block_kernels.h"

#include <cmath>
#include <cstring>

// One source, compiled for several instruction sets; the loader selects the best one that the processor
// supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PER_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_CPU
#endif
#define INLINE __attribute__((always_inline)) inline

namespace rlsc::cpu {
namespace {

INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Returns exp(d) for d <= 0 within 1.5 ulp. Below -87, where float32 leaves its normal range, returns 0, so
// -inf gives 0. NaN stays NaN.
INLINE float exp_negative(float d) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const float clamped = d < -87.0f ? -87.0f : d;
  const float shifted = clamped * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;  // minimax for (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const float scaled = p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return d < -87.0f ? 0.0f : scaled;
}

INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const float normal = as_float((magnitude << 13) + 0x38000000u);
  const float subnormal = float(int32_t(magnitude)) * 5.9604644775390625e-8f;
  const float special = as_float((magnitude << 13) + 0x70000000u);  // inf and NaN keep their mantissa
  const float value = magnitude < 0x0400u ? subnormal : (magnitude < 0x7c00u ? normal : special);
  return as_float(as_bits(value) | sign);
}

INLINE uint16_t float_to_half(float value) {
  const uint32_t sign = (as_bits(value) >> 16) & 0x8000u, magnitude = as_bits(value) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal's bits with the end of the mantissa and rounds them there.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (magnitude >= 0x477ff000u ? special : (magnitude < 0x38800000u ? subnormal : normal)));
}

INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? 0x7fc0u : rounded);
}

}  // namespace

PER_CPU void load(const float* x, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = x[i];
}

PER_CPU void load(const BFloat16* x, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = as_float(uint32_t(x[i].bits) << 16);
}

PER_CPU void load(const Float16* x, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = half_to_float(x[i].bits);
}

PER_CPU void store(const float* x, float scale, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = x[i] * scale;
}

PER_CPU void store(const float* x, float scale, BFloat16* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i].bits = float_to_bfloat16(x[i] * scale);
}

PER_CPU void store(const float* x, float scale, Float16* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i].bits = float_to_half(x[i] * scale);
}

PER_CPU float largest(const float* x, int n) {
  float result = kNegInf;
#pragma omp simd reduction(max : result)
  for (int i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

PER_CPU float exp_sum(const float* x, float shift, float scale, int n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp_negative((x[i] - shift) * scale);
  return sum;
}

PER_CPU float exp_store(const float* x, float shift, float scale, float* out, int n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const float e = exp_negative((x[i] - shift) * scale);
    out[i] = e;
    sum += e;
  }
  return sum;
}

PER_CPU ExpMoments exp_moments(const float* x, float shift, float scale, int n) {
  float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
  for (int i = 0; i < n; ++i) {
    const float d = (x[i] - shift) * scale, e = exp_negative(d);
    sum += e;
    weighted += e * (d < -87.0f ? 0.0f : d);  // 0 * -inf
  }
  return {sum, weighted};
}

PER_CPU void rest_gradient(const float* x, const RestGradient& row, float* out, int n) {
  const RestGradient r = row;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float d = (x[i] - r.shift) * r.scale - r.log_sum, log_q = d > 0.0f ? 0.0f : d;  // the excluded target may lie above
    const float finite = log_q < -87.0f ? 0.0f : log_q;
    out[i] = exp_negative(log_q) * (r.weight - r.entropy_weight * (finite + r.rest_entropy));
  }
}

}  // namespace rlsc::cpu
