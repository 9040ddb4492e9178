// The noise contract, version 1 (see ddpm_fast/noise/noise.py): Philox4x32-10 and Box-Muller from separately rounded fp32
// operations. Host: compile with -ffp-contract=off and without -ffast-math. Device: the _rn intrinsics below forbid
// contraction. Everything is force-inlined, so that no instruction-set variant can leak into another at link time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_INLINE __device__ __forceinline__
#else
#define DDPM_INLINE static inline __attribute__((always_inline))
#endif

#define DDPM_METHOD inline __attribute__((always_inline))  // the same within a class

namespace ddpm_fast {

struct NoiseKey {
  uint64_t seed;
  uint32_t stream;
  uint64_t first_sample;
};

#if defined(__CUDACC__)
DDPM_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DDPM_INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
DDPM_INLINE float sqrt_rn(float a) { return __fsqrt_rn(a); }
DDPM_INLINE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DDPM_INLINE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
#else
DDPM_INLINE float mul_rn(float a, float b) { return a * b; }
DDPM_INLINE float add_rn(float a, float b) { return a + b; }
DDPM_INLINE float sqrt_rn(float a) { return __builtin_sqrtf(a); }
DDPM_INLINE float bits_to_float(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
DDPM_INLINE uint32_t float_to_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
#endif

DDPM_INLINE void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// y * x + c in two roundings.
DDPM_INLINE float step_rn(float y, float x, float c) { return add_rn(mul_rn(y, x), c); }

// Natural logarithm on [2^-33, 1]: Cephes' logf polynomial on the mantissa in [sqrt(1/2), sqrt(2)), about 1 ulp.
DDPM_INLINE float log_unit(float x) {
  const int32_t half_root = 0x3f3504f3;  // bits of 0.70710677
  int32_t u = int32_t(float_to_bits(x)), e = (u - half_root) >> 23;
  float f = float(e), m = add_rn(bits_to_float(uint32_t(u) - (uint32_t(e) << 23)), -1.0f);
  float z = mul_rn(m, m);
  float y = step_rn(7.0376836e-2f, m, -1.1514610e-1f);
  y = step_rn(y, m, 1.1676998e-1f);
  y = step_rn(y, m, -1.2420141e-1f);
  y = step_rn(y, m, 1.4249323e-1f);
  y = step_rn(y, m, -1.6668058e-1f);
  y = step_rn(y, m, 2.0000715e-1f);
  y = step_rn(y, m, -2.4999994e-1f);
  y = step_rn(y, m, 3.3333331e-1f);
  y = mul_rn(mul_rn(y, m), z);
  y = add_rn(y, mul_rn(-2.1219444e-4f, f));
  y = add_rn(y, mul_rn(-0.5f, z));
  return add_rn(add_rn(m, y), mul_rn(0.69335938f, f));
}

// word 2^-32 rounded to fp32, without a conversion of unsigned integers, which AVX2 lacks: both halves of the word are
// planted in the mantissa of a power of two, so that only the last addition rounds.
DDPM_INLINE float unit_from_word(uint32_t word) {
  float high = bits_to_float((word >> 16) | 0x43000000u);     // 2^7 + high half 2^-16
  float low = bits_to_float((word & 0xffffu) | 0x3b000000u);  // 2^-9 + low half 2^-32
  return add_rn(add_rn(high, -128.001953125f), low);
}

// cos and sin of 2 pi turn for turn = (word >> 8) 2^-24: the quadrant, then polynomials on [-pi/4, pi/4].
DDPM_INLINE void cos_sin_turn(uint32_t word, float& cosine, float& sine) {
  uint32_t quadrant = word + 0x20000000u;  // to the nearest, in the two highest bits
  float r = mul_rn(float(int32_t(word << 2) >> 10), 3.7450704e-7f);  // signed remainder, times pi/2 2^-22
  float z = mul_rn(r, r);
  float s = step_rn(step_rn(z, -1.9515296e-4f, 8.3321609e-3f), z, -1.6666655e-1f);
  s = step_rn(mul_rn(s, z), r, r);
  float c = step_rn(step_rn(z, 2.4433157e-5f, -1.3887316e-3f), z, 4.1666646e-2f);
  c = add_rn(add_rn(mul_rn(mul_rn(c, z), z), mul_rn(-0.5f, z)), 1.0f);
  bool odd = int32_t(quadrant << 1) < 0;
  const uint32_t sign = 0x80000000u;
  sine = bits_to_float(float_to_bits(odd ? c : s) ^ (quadrant & sign));
  cosine = bits_to_float(float_to_bits(odd ? s : c) ^ ((quadrant + 0x40000000u) & sign));
}

DDPM_INLINE void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
  float u = add_rn(unit_from_word(radius_word), 1.1641532e-10f);  // 2^-33: (0, 1]
  float squared = mul_rn(-2.0f, log_unit(u));
  float radius = sqrt_rn(squared > 0.0f ? squared : 0.0f), cosine, sine;
  cos_sin_turn(angle_word, cosine, sine);
  z0 = mul_rn(radius, cosine);
  z1 = mul_rn(radius, sine);
}

}  // namespace ddpm_fast
