// Elementary functions in fp32, branch-free so that loops over them vectorise on any instruction set. Built of separately
// rounded operations, so every build gives the same bits. NaN stays NaN.
#pragma once
#include "philox.h"

namespace ddpm_fast {

constexpr float sqrt_half = 0.70710678f;
constexpr float sqrt_two_over_pi = 0.79788456f;
constexpr float inverse_sqrt_two_pi = 0.39894228f;

constexpr float integer_bits = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer in the low bits

// x = k ln 2 + r, and e^x = 2^k (1 + r + p): Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
struct Exponent { float k, r, p; };

// |x| < 2^21.
DDPM_INLINE Exponent exponent_of(float x) {
  float k = add_rn(step_rn(x, 1.44269504f, integer_bits), -integer_bits);
  float r = add_rn(add_rn(x, mul_rn(k, -0.693359375f)), mul_rn(k, 2.12194440e-4f));
  float p = step_rn(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = step_rn(p, r, 8.3334519073e-3f);
  p = step_rn(p, r, 4.1665795894e-2f);
  p = step_rn(p, r, 1.6666665459e-1f);
  p = step_rn(p, r, 5.0000001201e-1f);
  return {k, r, mul_rn(p, mul_rn(r, r))};
}

// 2^(k + shift) for an integer k, the sum in [-126, 127]; some float for NaN.
DDPM_INLINE float power_of_two(float k, int shift) {
  return bits_to_float((float_to_bits(add_rn(k, integer_bits)) << 23) + (uint32_t(127 + shift) << 23));
}

// e^x within 1.1 ulp for x <= 89, where it is infinite: 2^k is applied in two steps, as 2^128 is no float. Below e^-86.6 it is
// 0: the last of the normal numbers and all of the subnormal ones are given up.
DDPM_INLINE float exponential(float x) {
  const bool vanishes = x < -86.6f;
  const Exponent e = exponent_of(vanishes ? -86.6f : x);
  const float result = mul_rn(mul_rn(add_rn(add_rn(e.p, e.r), 1.0f), power_of_two(e.k, -1)), 2.0f);
  return vanishes ? 0.0f : result;
}

// ½ (e^d - 1), and ½ (e^d - 1 - d), which is never negative; each keeps its relative precision down to d = 0, where k = 0 and
// r = d leave p alone. Infinite only where they are beyond the largest float: a quarter is computed first, and the d that is
// taken away stops where the rest is infinite, or an infinite d would leave minus infinity.
struct Excess { float growth, beyond_linear; };

DDPM_INLINE Excess excess_of(float d) {
  const float linear = d > 89.7f ? 89.7f : d;
  const Exponent e = exponent_of(linear < -85.9f ? -85.9f : linear);
  const float power = power_of_two(e.k, -2), rest = add_rn(power, -0.25f);
  return {mul_rn(2.0f, add_rn(mul_rn(power, add_rn(e.r, e.p)), rest)),
          mul_rn(2.0f, add_rn(mul_rn(power, e.p), add_rn(add_rn(mul_rn(power, e.r), rest), mul_rn(-0.25f, linear))))};
}

// Natural logarithm of a positive normal number.
DDPM_INLINE float logarithm(float x) { return add_rn(log_unit(x), x - x); }

// The tanh approximation of the normal CDF at x, |x| <= 100, with which published bounds were computed: ½ (1 + tanh u) =
// 1 / (1 + e^-2u). `tail` is 1 - cdf, both with their relative precision; `slope`, of 2u, is the density over their product.
struct Logistic { float cdf, tail, slope; };

constexpr float tanh_cubic = 0.044715f;

DDPM_INLINE Logistic normal_tanh(float x) {
  const float square = mul_rn(x, x), twice_u = mul_rn(mul_rn(2.0f * sqrt_two_over_pi, x), step_rn(square, tanh_cubic, 1.0f));
  const float e = exponential(twice_u < 0.0f ? twice_u : -twice_u), larger = 1.0f / add_rn(1.0f, e), smaller = mul_rn(e, larger);
  const bool below = x < 0.0f;
  return {below ? smaller : larger, below ? larger : smaller, mul_rn(2.0f * sqrt_two_over_pi, step_rn(square, 3.0f * tanh_cubic, 1.0f))};
}

// The normal distribution at x, |x| <= 100: its CDF and its density.
struct Normal { float cdf, density; };

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
