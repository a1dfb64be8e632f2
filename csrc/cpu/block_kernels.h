// Loops over one block of a row in float32. They are simple enough for the compiler to vectorize and are
// compiled once per CPU generation.
#pragma once

#include <cstdint>
#include <limits>

namespace rlsc::cpu {

constexpr int kBlock = 2048;  // floats; two such blocks stay in the L1 cache
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// out = x
void load(const float* x, float* out, int n);
void load(const BFloat16* x, float* out, int n);
void load(const Float16* x, float* out, int n);

// out = x * scale, rounded to nearest even
void store(const float* x, float scale, float* out, int n);
void store(const float* x, float scale, BFloat16* out, int n);
void store(const float* x, float scale, Float16* out, int n);

float largest(const float* x, int n);  // NaN is passed over; -inf for n = 0

// Below, d = (x - shift) * scale with x <= shift. NaN stays NaN.

// sum of exp(d)
float exp_sum(const float* x, float shift, float scale, int n);

// out = exp(d) and their sum; out may be x
float exp_store(const float* x, float shift, float scale, float* out, int n);

struct ExpMoments {
  float sum;       // sum exp(d)
  float weighted;  // sum exp(d) * d
};
ExpMoments exp_moments(const float* x, float shift, float scale, int n);

// out = q * (weight - entropy_weight * (log q + rest_entropy)), log q = d - log_sum; out may be x
struct RestGradient {
  float shift, scale, log_sum, weight, entropy_weight, rest_entropy;
};
void rest_gradient(const float* x, const RestGradient& row, float* out, int n);

}  // namespace rlsc::cpu
