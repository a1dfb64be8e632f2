// Shared parts of the row kernels: 16-byte vectors of logits, running sums of exponentials, reductions over a
// block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rlsc::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kWarp = 32;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float x) {  // relative error 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Conversions by function name, because torch compiles extensions without the operators of the half types.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void store_float(float* at, float x) { *at = x; }
__device__ __forceinline__ void store_float(__nv_bfloat16* at, float x) { *at = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_float(__half* at, float x) { *at = __float2half_rn(x); }

// Rounds two floats to nearest, in one instruction if the type has one.
__device__ __forceinline__ void pack_pair(float low, float high, float* out) { out[0] = low, out[1] = high; }
__device__ __forceinline__ void pack_pair(float low, float high, __nv_bfloat16* out) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ void pack_pair(float low, float high, __half* out) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(low, high);
}

// Unpacks the one or two logits of a 4-byte word; the last argument only selects the type.
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const float*) { out[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const __nv_bfloat16*) {
  out[0] = __uint_as_float(word << 16), out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const __half*) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  out[0] = both.x, out[1] = both.y;
}

// Converts 16 bytes of logits to floats and back.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);

  // Takes the vector by value, word by word: elements read through a pointer would become loads of 2 bytes
  // each.
  static __device__ __forceinline__ void unpack(uint4 raw, float (&x)[kSize]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) unpack_word(words[k], x + k * (kSize / 4), static_cast<const T*>(nullptr));
  }

  static __device__ __forceinline__ uint4 pack(const float (&x)[kSize]) {
    uint4 raw;
    T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int k = 0; k < kSize; k += 2) pack_pair(x[k], x[k + 1], elements + k);
    return raw;
  }

  // Overwrites one element. The loop has constant indices, so that x stays in registers.
  static __device__ __forceinline__ void set(float (&x)[kSize], int element, float value) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = k == element ? value : x[k];
  }
};

// Writes N floats rounded to Out, in one store of 16 or 8 bytes. The store is a streaming store, because the
// values are not read again soon.
template <typename Out, int N>
__device__ __forceinline__ void store_vector(Out* at, const float (&x)[N]) {
  static_assert(N * sizeof(Out) == 16 || N * sizeof(Out) == 8);
  if constexpr (N * sizeof(Out) == 16) {
    __stcs(reinterpret_cast<uint4*>(at), Vector<Out>::pack(x));
  } else {
    uint2 raw;
#pragma unroll
    for (int k = 0; k < N; k += 2) pack_pair(x[k], x[k + 1], reinterpret_cast<Out*>(&raw) + k);
    __stcs(reinterpret_cast<uint2*>(at), raw);
  }
}

template <int N, typename Out>
__device__ __forceinline__ void store_zeros(Out* at) {
  const float zeros[N] = {};
  store_vector(at, zeros);
}

// A running sum of exponentials in base 2: sum of 2^(x * scale - top) with scale = log2(e) / temperature.
// `top` is a float near the largest x * scale, and the sum is relative to exactly that float. NaN stays NaN
// in the sum.
struct Mass {
  float top, sum;

  __device__ __forceinline__ static Mass none() { return {negative_infinity(), 0.0f}; }

  __device__ __forceinline__ float finite_top() const { return top == negative_infinity() ? 0.0f : top; }

  __device__ __forceinline__ Mass join(const Mass& other) const {
    const float high = fmaxf(top, other.top);
    if (high == negative_infinity()) return {high, sum + other.sum};  // 0 or NaN
    return {high, sum * exp2_fast(top - high) + other.sum * exp2_fast(other.top - high)};
  }

  // Adds N logits with one rescaling of the sum.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], float scale) {
    float high = x[0];
#pragma unroll
    for (int k = 1; k < N; ++k) high = fmaxf(high, x[k]);
    high = fmaxf(top, high * scale);
    const float finite = high == negative_infinity() ? 0.0f : high;
    float part = 0.0f;
#pragma unroll
    for (int k = 0; k < N; ++k) part += exp2_fast(fmaf(x[k], scale, -finite));
    sum = fmaf(sum, exp2_fast(top - finite), part);
    top = high;
  }
};

__device__ __forceinline__ Mass warp_join(Mass mass) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    mass = mass.join({__shfl_xor_sync(~0u, mass.top, offset), __shfl_xor_sync(~0u, mass.sum, offset)});
  }
  return mass;
}

// A finished row: its outputs, and the values that overwrite it: rest_scale * 2^(x * scale - top), and
// target_value at the target.
struct Finish {
  float outputs[3];  // log p, or (top, log_sum, target) as in rlsc_mcore/ops/reference.py
  float rest_scale, top, target_value;
};

// Computes log_prob_dlogits_ or rest_softmax_ of rlsc_mcore/ops/reference.py for one row. `target` is the
// target's logit, -inf if no rank holds it.
template <bool kWeighted>
__device__ __forceinline__ Finish finish_row(const Mass& rest, float target, float weight, float inv_temperature, float scale) {
  const float log2_sum = log2f(rest.sum), per_sum = rest.sum == 0.0f ? 0.0f : 1.0f / rest.sum;  // -inf and 0 for an empty rest
  if (kWeighted) {
    // A target of +inf gives NaN, as in log_softmax.
    const float gap = target == -negative_infinity() ? target - target : (fmaf(-target, scale, rest.top) + log2_sum) * kLn2;
    const float tail = expf(-fabsf(gap)), slope = weight * inv_temperature * (gap >= 0.0f ? 1.0f : tail) / (1.0f + tail);
    const float log_p = 0.0f - (fmaxf(gap, 0.0f) + log1pf(tail));
    return {{log_p, 0.0f, 0.0f}, -slope * per_sum, rest.finite_top(), slope};
  }
  // `top` converted to a logit, and the sum relative to exactly that logit.
  const float top = rest.top / scale, log_sum = (log2_sum + (rest.sum == 0.0f ? 0.0f : fmaf(-top, scale, rest.top))) * kLn2;
  return {{top, log_sum, target}, per_sum, rest.finite_top(), -1.0f};
}

// Arguments of one row op on the device. The outputs are statistics [T, 3] or, if weighted, log p [T].
struct Rows {
  const void* logits;
  void* written;  // what overwrites the logits: they themselves, or rows of another type
  const int64_t* targets;
  const float* weights;
  float* out;
  int64_t num_rows, row_stride, written_stride;
  int64_t vocab_start;
  int num_columns, row_columns;
  float inv_temperature;
};

constexpr int num_outputs(bool weighted) { return weighted ? 1 : 3; }

template <bool kWeighted>
__device__ __forceinline__ void write_outputs(const Rows& rows, int64_t row, const Finish& finish) {
#pragma unroll
  for (int k = 0; k < num_outputs(kWeighted); ++k) rows.out[row * num_outputs(kWeighted) + k] = finish.outputs[k];
}

template <bool kWeighted>
__device__ __forceinline__ void write_ignored(const Rows& rows, int64_t row) {
  write_outputs<kWeighted>(rows, row, {{kWeighted ? 0.0f : negative_infinity(), negative_infinity(), 0.0f}, 0.0f, 0.0f, 0.0f});
}

// Returns the target's column on this rank, or -1.
__device__ __forceinline__ int target_column(const Rows& rows, int64_t target) {
  const int64_t column = target - rows.vocab_start;
  return column >= 0 && column < rows.num_columns ? int(column) : -1;
}

}  // namespace rlsc::cuda
