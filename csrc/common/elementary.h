// Elementary functions in fp32, branch-free so that loops over them vectorise on any instruction set. Built of separately
// rounded operations, so every build gives the same bits. NaN stays NaN.
#pragma once
#include "philox.h"

namespace ddpm_fast {

constexpr float sqrt_half = 0.70710678f;
constexpr float sqrt_two_over_pi = 0.79788456f;
constexpr float inverse_sqrt_two_pi = 0.39894228f;

// e^x within 1.1 ulp: 2^k times Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]. Overflows to infinity, underflows through the
// subnormal numbers to 0: 2^k is applied in two halves.
DDPM_INLINE float exponential(float x) {
  const float rounder = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer in the low bits
  x = x > 95.0f ? 95.0f : x;
  x = x < -110.0f ? -110.0f : x;
  float shifted = step_rn(x, 1.44269504f, rounder), k = add_rn(shifted, -rounder);
  float r = add_rn(add_rn(x, mul_rn(k, -0.693359375f)), mul_rn(k, 2.12194440e-4f));
  float p = step_rn(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = step_rn(p, r, 8.3334519073e-3f);
  p = step_rn(p, r, 4.1665795894e-2f);
  p = step_rn(p, r, 1.6666665459e-1f);
  p = step_rn(p, r, 5.0000001201e-1f);
  p = add_rn(add_rn(mul_rn(p, mul_rn(r, r)), r), 1.0f);
  int32_t n = int32_t(float_to_bits(shifted)) - 0x4b400000, half = n >> 1;
  return mul_rn(mul_rn(p, bits_to_float(uint32_t(half + 127) << 23)), bits_to_float(uint32_t(n - half + 127) << 23));
}

// Natural logarithm of a positive normal number.
DDPM_INLINE float logarithm(float x) { return add_rn(log_unit(x), x - x); }

// e^d - 1 - d without cancellation: never negative, relative precision kept down to d = 0. Below |d| = 1 a polynomial
// interpolated at Chebyshev nodes (relative error 2e-8).
DDPM_INLINE float exp_minus_one_minus(float d, float exp_d) {
  float p = step_rn(2.812654657e-6f, d, 2.535864405e-5f);
  p = step_rn(p, d, 1.983698603e-4f);
  p = step_rn(p, d, 1.388539444e-3f);
  p = step_rn(p, d, 8.333344944e-3f);
  p = step_rn(p, d, 4.166673496e-2f);
  p = step_rn(p, d, 1.666666716e-1f);
  p = step_rn(p, d, 0.5f);
  float near = mul_rn(p, mul_rn(d, d)), far = add_rn(add_rn(exp_d, -1.0f), -d);
  return (d < 0.0f ? -d : d) < 1.0f ? near : far;
}

// The normal distribution at x, |x| <= 100: its CDF and its density.
struct Normal { float cdf, density; };

// The tanh approximation, with which published bounds were computed: ½ (1 + tanh u) = 1 / (1 + e^-2u), so that both
// tails keep their relative precision.
DDPM_INLINE Normal normal_tanh(float x) {
  float square = mul_rn(x, x);
  float u = mul_rn(mul_rn(sqrt_two_over_pi, x), step_rn(square, 0.044715f, 1.0f));
  float e = exponential(mul_rn(-2.0f, u < 0.0f ? -u : u)), inverse = 1.0f / add_rn(1.0f, e);
  float slope = mul_rn(2.0f * sqrt_two_over_pi, step_rn(square, 0.134145f, 1.0f));  // of 2u
  return {mul_rn(u < 0.0f ? e : 1.0f, inverse), mul_rn(mul_rn(mul_rn(e, inverse), inverse), slope)};
}

// ½ erfc(-x / √2). (1 + 2z) e^z² erfc(z) is smooth in (z - 2) / (z + 2): a polynomial interpolated at Chebyshev nodes for z
// up to 10.2 (relative error 3e-8); beyond it erfc is 0 in fp32. z² is formed exactly in two parts before it is an exponent.
DDPM_INLINE Normal normal_erf(float x) {
  float magnitude = x < 0.0f ? -x : x, z = mul_rn(magnitude, sqrt_half);
  z = z > 10.2f ? 10.2f : z;
  float t = add_rn(z, -2.0f) / add_rn(z, 2.0f);
  float p = step_rn(-4.0829342e-4f, t, -1.2390090e-3f);
  p = step_rn(p, t, 1.3208493e-3f);
  p = step_rn(p, t, 8.6411564e-3f);
  p = step_rn(p, t, -8.0622835e-3f);
  p = step_rn(p, t, -5.4207395e-2f);
  p = step_rn(p, t, 1.6405569e-1f);
  p = step_rn(p, t, -1.6603111e-1f);
  p = step_rn(p, t, -9.2763998e-2f);
  p = step_rn(p, t, 1.2769784f);
  float high = bits_to_float(float_to_bits(z) & 0xfffff000u), low = add_rn(z, -high);
  float gauss = mul_rn(exponential(-mul_rn(high, high)), exponential(-mul_rn(add_rn(z, high), low)));  // e^-z²
  float tail = mul_rn(0.5f, mul_rn(p, gauss) / step_rn(2.0f, z, 1.0f));
  return {x < 0.0f ? tail : add_rn(1.0f, -tail), mul_rn(inverse_sqrt_two_pi, magnitude > 14.0f ? 0.0f : gauss)};
}

}  // namespace ddpm_fast
