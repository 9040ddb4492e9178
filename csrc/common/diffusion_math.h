// The per-element formulas of the method, for host and device. Names and constants are those of the reference twins in
// ddpm_fast/ops/.
#pragma once
#include "elementary.h"

namespace ddpm_fast {

// x_t = signal x_start + sigma epsilon (Ho et al. 2020, eq. 4; with the single step's tables, eq. 2).
DDPM_INLINE float q_sample_element(float signal, float sigma, float x_start, float epsilon) {
  return add_rn(mul_rn(signal, x_start), mul_rn(sigma, epsilon));
}

// One of two numbers' bounds; NaN is kept, as torch.clamp keeps it.
DDPM_INLINE float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// 1 where a gradient passes clamp(x, -limit, limit), ends included, else 0.
DDPM_INLINE float passes(float x, float limit) { return (x >= -limit) & (x <= limit) ? 1.0f : 0.0f; }

// How a model's output gives the log-variance: fixed does not read it, learned takes it as it is, learned_range goes from
// low to high as it goes from -1 to 1.
enum class Variance : int { fixed = 0, learned = 1, learned_range = 2 };

DDPM_INLINE float log_variance_element(Variance kind, float low, float high, float raw) {
  return kind == Variance::learned ? raw : add_rn(low, mul_rn(0.5f * (high - low), add_rn(raw, 1.0f)));
}
DDPM_INLINE float log_variance_slope(Variance kind, float low, float high) {
  return kind == Variance::learned ? 1.0f : 0.5f * (high - low);
}

// e^(½ log_variance).
DDPM_INLINE float deviation(float log_variance) {
  float exponent = mul_rn(0.5f, log_variance);
  return exponential(exponent > 89.0f ? 89.0f : exponent);
}

// e^(-½ log_variance), finite in fp32: a distance of 0 stays 0 however small the variance.
DDPM_INLINE float inverse_deviation(float log_variance) {
  float exponent = mul_rn(-0.5f, log_variance);
  return exponential(exponent > 88.0f ? 88.0f : exponent);
}

// KL(N(m1, e^l1) ‖ N(m2, e^l2)) in nats, from the deviations that Gaussians differ by: d = l1 - l2, distance = (m1 - m2) e^(-½ l2).
DDPM_INLINE float kl_element(float beyond_linear, float distance) {
  return add_rn(beyond_linear, mul_rn(mul_rn(0.5f, distance), distance));
}

// The decoder's bin (Ho et al., eq. 13): the probability that a Gaussian around `mean` gives the grey level x_start, and the
// derivatives of its logarithm. `inverse` is one over the deviation, `half` half a bin's width.
struct Bin { float probability, by_mean, by_log_deviation; };

constexpr float decoder_edge = 0.999f;       // data beyond it lies in one of the two open bins
constexpr float decoder_floor = 1e-12f;      // of a bin's probability, as in the published code
constexpr float decoder_saturated = 100.0f;  // the CDF is 0 or 1 beyond it; a larger argument would overflow where it is cubed
constexpr float decoder_min_log_scale = -80.0f;

DDPM_INLINE float saturate(float x) { return clamp(x, -decoder_saturated, decoder_saturated); }

// With the tanh CDF Φ and its argument 2u, Φ(a) - Φ(b) = Φ(a) Φ(-b) (1 - e^-gap), gap = 2u(a) - 2u(b): a product that loses no
// precision however narrow the bin or far its edges. An open bin lacks the factors of the edge that it lacks.
DDPM_INLINE Bin decoder_tanh(float x_start, float mean, float inverse, float half) {
  const float centered = x_start - mean, a = saturate(mul_rn(inverse, centered + half)), b = saturate(mul_rn(inverse, centered - half));
  const float width = saturate(mul_rn(inverse, half)) * 2.0f, squares = add_rn(mul_rn(a, add_rn(a, b)), mul_rn(b, b));
  const bool first = x_start < -decoder_edge;
  const bool last = x_start > decoder_edge, open = first | last;
  const Logistic upper = normal_tanh(a), lower = normal_tanh(b);
  const float scale = mul_rn(2.0f * sqrt_two_over_pi, width);
  const float inside = -2.0f * excess_of(-mul_rn(scale, step_rn(squares, tanh_cubic, 1.0f))).growth;
  const float probability = mul_rn(mul_rn(last ? 1.0f : upper.cdf, first ? 1.0f : lower.tail), open ? 1.0f : inside);
  const float by_a = last ? 0.0f : mul_rn(upper.slope, upper.tail), by_b = first ? 0.0f : mul_rn(lower.slope, lower.cdf);
  const float by_gap = open ? 0.0f : mul_rn(add_rn(1.0f, -inside) / inside, scale);
  return {probability, mul_rn(inverse, by_b - by_a - mul_rn(mul_rn(by_gap, 3.0f * tanh_cubic), add_rn(a, b))),
          mul_rn(b, by_b) - mul_rn(a, by_a) - mul_rn(by_gap, step_rn(squares, 3.0f * tanh_cubic, 1.0f))};
}

// With the exact CDF. A bin narrower than 0.4 deviations is integrated: five Gauss-Legendre nodes are exact to fp32 there, and
// all terms of the sum are positive. The others are differences; where x_start lies above the mean both edges are mirrored, so
// that the difference is one of two small numbers, not of two near 1.
DDPM_INLINE void add_node(float z, float weight, float& mass, float& first, float& second) {  // integrals of φ, zφ and (1 - z²)φ
  const float square = mul_rn(z, z), term = mul_rn(weight, exponential(mul_rn(-0.5f, square)));
  mass = add_rn(mass, term);
  first = add_rn(first, mul_rn(z, term));
  second = add_rn(second, mul_rn(1.0f - square, term));
}

DDPM_INLINE Bin decoder_erf(float x_start, float mean, float inverse, float half) {
  const float centered = x_start - mean;
  const float upper = saturate(mul_rn(inverse, centered + half)), lower = saturate(mul_rn(inverse, centered - half));
  const bool first = x_start < -decoder_edge;
  const bool last = x_start > decoder_edge, open = first | last;
  const bool mirrored = last | (!first & (centered > 0.0f));
  const float a = mirrored ? -lower : upper, b = mirrored ? -upper : lower, inner = open ? 0.0f : 1.0f;
  const Normal at_a = normal_erf(a), at_b = normal_erf(b);
  const float difference = at_a.cdf - inner * at_b.cdf, density = at_a.density - inner * at_b.density;

  const float middle = saturate(mul_rn(inverse, centered)), reach = saturate(mul_rn(inverse, half));
  const float width = inverse_sqrt_two_pi * 2.0f * reach;
  float mass = 0.0f, mass_first = 0.0f, mass_second = 0.0f;
  add_node(middle, 0.284444444f * width, mass, mass_first, mass_second);
  add_node(middle - 0.53846931f * reach, 0.239314335f * width, mass, mass_first, mass_second);
  add_node(middle + 0.53846931f * reach, 0.239314335f * width, mass, mass_first, mass_second);
  add_node(middle - 0.906179846f * reach, 0.118463443f * width, mass, mass_first, mass_second);
  add_node(middle + 0.906179846f * reach, 0.118463443f * width, mass, mass_first, mass_second);

  const bool narrow = reach < (open ? 0.0f : 0.2f);
  const float probability = narrow ? mass : difference, by_mean = narrow ? mass_first : mirrored ? density : -density;
  return {probability, inverse * by_mean / probability,
          -(narrow ? mass_second : a * at_a.density - inner * (b * at_b.density)) / probability};
}

}  // namespace ddpm_fast
