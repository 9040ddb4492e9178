// vlb_terms: L_t of the bound in bits per dimension, one value a sample: for t > 0 the KL divergence of the posterior from
// p_θ, at t = 0 the decoder's negative log-likelihood. Reads out, x_start and x_t once. Backward recomputes and writes the
// gradient of out once.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct Row {
  float from_x_t, from_out, mean1, mean2, posterior_log_variance, low, high, unused;  // COLUMNS in ddpm_fast/ops/vlb_terms.py
};

struct State {
  explicit State(const VlbTermsArguments&) {}
  Buffer prediction, raw, x_start, x_t, mean, pass, inverse, value, grad, grad_raw;
};

struct Block {
  const VlbTermsArguments& a;
  State& state;
  const int64_t sample, first, count;
  const Row row = reinterpret_cast<const Row*>(a.table)[a.t[sample]];
  const bool decoded = a.t[sample] == 0, learned = a.variance != Variance::fixed;
  const float *x_start = nullptr, *x_t = nullptr, *prediction = nullptr, *raw = nullptr;

  DDPM_METHOD void load() {
    const int64_t offset = sample * a.sizes.elements + first, place = sample * a.out.stride + first;
    x_start = read(a.x_start, offset, count, state.x_start);
    x_t = read(a.x_t, offset, count, state.x_t);
    prediction = read(a.out.view, place, count, state.prediction);
    if (learned) raw = read(a.out.view, place + a.sizes.elements, count, state.raw);
  }
  DDPM_METHOD float guess(int64_t i) const { return add_rn(mul_rn(row.from_x_t, x_t[i]), mul_rn(row.from_out, prediction[i])); }
  DDPM_METHOD float mean(int64_t i, float limit) const {
    return add_rn(mul_rn(row.mean1, clamp(guess(i), -limit, limit)), mul_rn(row.mean2, x_t[i]));
  }
  DDPM_METHOD float true_mean(int64_t i) const { return add_rn(mul_rn(row.mean1, x_start[i]), mul_rn(row.mean2, x_t[i])); }
  DDPM_METHOD float limit() const { return a.clip ? 1.0f : __builtin_inff(); }
};

// Value, and derivatives by p_θ's mean and log-variance, of one element's KL: of q(x_{t-1} | x_t, x_0) from p_θ.
struct Term { float value, by_mean, by_log_variance; };

DDPM_INLINE Term kl_term(float true_mean, float mean, float d, float exp_d, float inverse) {
  const float distance = mul_rn(true_mean - mean, inverse), excess = exp_minus_one_minus(d, exp_d), square = mul_rn(distance, distance);
  return {kl_element(excess, distance), -mul_rn(distance, inverse), mul_rn(-0.5f, add_rn(add_rn(excess, d), square))};
}

// Calls put(i, Term) for each element of a block with t > 0.
template <Variance kind, typename Put>
DDPM_INLINE void kl_terms(const Block& b, const Put& put) {
  const Row row = b.row;
  const float limit = b.limit();
  if (kind == Variance::fixed) {
    const float d = row.posterior_log_variance - row.low, exp_d = exponential(d), inverse = inverse_deviation(row.low);
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) put(i, kl_term(b.true_mean(i), b.mean(i, limit), d, exp_d, inverse));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) {
      const float log_variance = log_variance_element(kind, row.low, row.high, b.raw[i]), d = row.posterior_log_variance - log_variance;
      put(i, kl_term(b.true_mean(i), b.mean(i, limit), d, exponential(d), inverse_deviation(log_variance)));
    }
  }
}

// The same of a block with t = 0: nats of the decoder's bin.
template <bool exact, typename Put>
DDPM_INLINE void decoder_terms(const Block& b, const Put& put) {
  const Row row = b.row;
  const float limit = b.limit(), half = float(1.0 / double(b.a.levels - 1));
  const Variance kind = b.a.variance;
  const bool learned = b.learned;
#pragma omp simd
  for (int64_t i = 0; i < b.count; ++i) {
    const float log_scale = mul_rn(0.5f, learned ? log_variance_element(kind, row.low, row.high, b.raw[i]) : row.low);
    const float inverse = exponential(-(log_scale < decoder_min_log_scale ? decoder_min_log_scale : log_scale));
    const Bin bin = decoder_element<exact>(b.x_start[i], b.mean(i, limit), inverse, half);
    const float probability = bin.probability < decoder_floor ? decoder_floor : bin.probability;
    const float slope = bin.probability < decoder_floor ? 0.0f : -1.0f / probability;
    put(i, {-logarithm(probability), mul_rn(slope, bin.slope_mean), log_scale < decoder_min_log_scale ? 0.0f : mul_rn(0.5f, mul_rn(slope, bin.slope_log_deviation))});
  }
}

template <typename Put>
DDPM_INLINE void terms(const Block& b, const Put& put) {
  if (b.decoded) return b.a.exact_cdf ? decoder_terms<true>(b, put) : decoder_terms<false>(b, put);
  switch (b.a.variance) {
    case Variance::fixed: return kl_terms<Variance::fixed>(b, put);
    case Variance::learned: return kl_terms<Variance::learned>(b, put);
    case Variance::learned_range: return kl_terms<Variance::learned_range>(b, put);
  }
}

constexpr double ln2 = 0.693147180559945309;

}  // namespace

void vlb_terms(const VlbTermsArguments& a) {
  sum_each_sample<State>(
      a,
      [&](State& state, int64_t sample, int64_t first, int64_t count) {
        Block b{a, state, sample, first, count};
        b.load();
        float* const value = state.value.values;
        terms(b, [&](int64_t i, const Term& term) { value[i] = term.value; });
        return sum(value, count);
      },
      [&](int64_t sample, double total) { a.terms[sample] = float(total / double(a.sizes.elements) / ln2); });
}

void vlb_terms_backward(const VlbTermsArguments& a) {
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) {
    Block b{a, state, sample, first, count};
    b.load();
    const float share = a.grad_terms[sample] * float(1.0 / (double(a.sizes.elements) * ln2));
    const float by_prediction = share * b.row.mean1 * b.row.from_out;
    const float by_raw = b.learned ? share * log_variance_slope(a.variance, b.row.low, b.row.high) : 0.0f;
    const int64_t place = sample * a.grad_out.stride + first;
    float* const grad = place_for(a.grad_out.view, place, state.grad);
    float* const grad_raw = b.learned ? place_for(a.grad_out.view, place + a.sizes.elements, state.grad_raw) : state.grad_raw.values;
    const bool clip = a.clip;
    if (b.learned) {
      terms(b, [&](int64_t i, const Term& term) {
        grad[i] = mul_rn(mul_rn(by_prediction, term.by_mean), clip ? passes(b.guess(i), 1.0f) : 1.0f);
        grad_raw[i] = mul_rn(by_raw, term.by_log_variance);
      });
    } else {
      terms(b, [&](int64_t i, const Term& term) { grad[i] = mul_rn(mul_rn(by_prediction, term.by_mean), clip ? passes(b.guess(i), 1.0f) : 1.0f); });
    }
    if (a.detach_mean) write_zeros(a.grad_out.view, place, count);
    else write(a.grad_out.view, place, count, state.grad);
    if (b.learned) write(a.grad_out.view, place + a.sizes.elements, count, state.grad_raw);
    else if (a.grad_out.stride > a.sizes.elements) write_zeros(a.grad_out.view, place + a.sizes.elements, count);
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
