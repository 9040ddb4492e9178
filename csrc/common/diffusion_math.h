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
DDPM_INLINE float passes(float x, float limit) { return x >= -limit && x <= limit ? 1.0f : 0.0f; }

// How a model's output gives the log-variance: fixed does not read it, learned takes it as it is, learned_range goes from
// low to high as it goes from -1 to 1.
enum class Variance : int { fixed = 0, learned = 1, learned_range = 2 };

DDPM_INLINE float log_variance_element(Variance kind, float low, float high, float raw) {
  return kind == Variance::learned ? raw : add_rn(low, mul_rn(mul_rn(0.5f, add_rn(raw, 1.0f)), high - low));
}
DDPM_INLINE float log_variance_slope(Variance kind, float low, float high) {
  return kind == Variance::learned ? 1.0f : 0.5f * (high - low);
}

// e^(-½ log_variance), finite in fp32: a distance of 0 stays 0 however small the variance.
DDPM_INLINE float inverse_deviation(float log_variance) {
  float exponent = mul_rn(-0.5f, log_variance);
  return exponential(exponent > 88.0f ? 88.0f : exponent);
}

// KL(N(m1, e^l1) ‖ N(m2, e^l2)) in nats, from the deviations that Gaussians differ by: d = l1 - l2, distance = (m1 - m2) e^(-½ l2).
DDPM_INLINE float kl_element(float excess, float distance) { return mul_rn(0.5f, add_rn(excess, mul_rn(distance, distance))); }

// The decoder's bin (Ho et al., eq. 13): the probability that a Gaussian around `mean` gives the grey level x_start, and its
// derivatives. `inverse` is one over the deviation, `half` half a bin's width. Where x_start lies above the mean both edges
// are mirrored: the mass is then the difference of two small numbers, not of two near 1.
struct Bin { float probability, slope_mean, slope_log_deviation; };

constexpr float decoder_edge = 0.999f;      // data beyond it lies in one of the two open bins
constexpr float decoder_floor = 1e-12f;     // of a bin's probability, as in the published code
constexpr float decoder_saturated = 100.0f; // the CDF is 0 or 1 beyond it; a larger argument would overflow where it is cubed
constexpr float decoder_min_log_scale = -80.0f;

template <bool exact>
DDPM_INLINE Bin decoder_element(float x_start, float mean, float inverse, float half) {
  float centered = x_start - mean;
  float upper = clamp(mul_rn(inverse, centered + half), -decoder_saturated, decoder_saturated);
  float lower = clamp(mul_rn(inverse, centered - half), -decoder_saturated, decoder_saturated);
  bool first = x_start < -decoder_edge, last = x_start > decoder_edge;
  bool mirrored = last || (!first && centered > 0.0f);
  float a = mirrored ? -lower : upper, b = mirrored ? -upper : lower;
  Normal at_a = exact ? normal_erf(a) : normal_tanh(a), at_b = exact ? normal_erf(b) : normal_tanh(b);
  float inner = first || last ? 0.0f : 1.0f;
  float density = at_a.density - inner * at_b.density;
  return {at_a.cdf - inner * at_b.cdf, inverse * (mirrored ? density : -density), -(a * at_a.density - inner * (b * at_b.density))};
}

}  // namespace ddpm_fast
