// vlb_terms: L_t of the bound in bits per dimension, one value a sample: for t > 0 the KL divergence of the posterior from
// p_θ, at t = 0 the decoder's negative log-likelihood. Reads out, x_start and x_t once; writes the terms, the gradient of out
// (for the gradient of the terms given, or for ones), or both in one pass.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct Row {
  float from_x_t, from_out, mean1, mean2, posterior_log_variance, low, high, unused;  // COLUMNS in ddpm_fast/ops/_vlb_terms.py
};

struct State {
  explicit State(const VlbTermsArguments&) {}
  Buffer prediction, raw, x_start, x_t, value, grad, grad_raw;
};

// One element's nats and their derivatives by the prediction and by the raw output that gives the variance.
struct Term { float value, by_prediction, by_raw; };

// What a sample's elements share. Methods take values, not places, so that a loop over them vectorises.
template <Variance kind>
struct Model {
  const Row row;
  const float limit;

  DDPM_METHOD float guess(float x_t, float prediction) const { return add_rn(mul_rn(row.from_x_t, x_t), mul_rn(row.from_out, prediction)); }
  DDPM_METHOD float mean(float x_start, float x_t) const { return add_rn(mul_rn(row.mean1, x_start), mul_rn(row.mean2, x_t)); }
  DDPM_METHOD float log_variance(float raw) const {
    return kind == Variance::fixed ? row.low : log_variance_element(kind, row.low, row.high, raw);
  }
  DDPM_METHOD Term chain(float value, float by_mean, float by_log_variance, float guess) const {
    const float slope = kind == Variance::fixed ? 0.0f : log_variance_slope(kind, row.low, row.high);
    return {value, mul_rn(mul_rn(row.mean1 * row.from_out, by_mean), passes(guess, limit)), mul_rn(slope, by_log_variance)};
  }
};

// What of the divergence depends on p_θ's log-variance alone.
struct Spread {
  Excess excess;
  float inverse;
  DDPM_METHOD Spread(float posterior_log_variance, float log_variance)
      : excess(excess_of(posterior_log_variance - log_variance)), inverse(inverse_deviation(log_variance)) {}
};

template <Variance kind>
struct Divergence : Model<kind> {
  const Spread fixed;  // for all elements of the sample

  DDPM_METHOD explicit Divergence(const Model<kind>& model) : Model<kind>(model), fixed(model.row.posterior_log_variance, model.row.low) {}
  DDPM_METHOD Term operator()(float x_start, float x_t, float prediction, float raw) const {
    const Spread s = kind == Variance::fixed ? fixed : Spread(this->row.posterior_log_variance, this->log_variance(raw));
    const float guess = this->guess(x_t, prediction);
    const float distance = mul_rn(this->mean(x_start, x_t) - this->mean(clamp(guess, -this->limit, this->limit), x_t), s.inverse);
    const float by_log_variance = -add_rn(s.excess.growth, mul_rn(mul_rn(0.5f, distance), distance));
    return this->chain(kl_element(s.excess.beyond_linear, distance), -mul_rn(distance, s.inverse), by_log_variance, guess);
  }
};

template <Variance kind, bool exact>
struct Decoder : Model<kind> {
  const float half;

  DDPM_METHOD Term operator()(float x_start, float x_t, float prediction, float raw) const {
    const float guess = this->guess(x_t, prediction), mean = this->mean(clamp(guess, -this->limit, this->limit), x_t);
    const float log_scale = mul_rn(0.5f, this->log_variance(raw));
    const bool narrow = log_scale < decoder_min_log_scale;
    const float inverse = exponential(-(narrow ? decoder_min_log_scale : log_scale));
    const Bin bin = exact ? decoder_erf(x_start, mean, inverse, half) : decoder_tanh(x_start, mean, inverse, half);
    const bool missed = bin.probability < decoder_floor;
    return this->chain(-logarithm(missed ? decoder_floor : bin.probability), missed ? 0.0f : -bin.by_mean,
                       missed | narrow ? 0.0f : mul_rn(-0.5f, bin.by_log_deviation), guess);
  }
};

// A block's inputs and results in fp32.
struct Places {
  const float *x_start, *x_t, *prediction, *raw;
  float *value, *grad, *grad_raw;
};

// The elements of a block by one formula: their values, and where `gradient` says so their derivatives times `share`.
template <bool gradient, typename Formula>
DDPM_INLINE void evaluate(const Formula formula, const Places p, int64_t count, float share) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term term = formula(p.x_start[i], p.x_t[i], p.prediction[i], p.raw[i]);
    p.value[i] = term.value;
    if (gradient) {
      p.grad[i] = mul_rn(share, term.by_prediction);
      p.grad_raw[i] = mul_rn(share, term.by_raw);
    }
  }
}
template <bool gradient, Variance kind>
DDPM_INLINE void evaluate_kind(const VlbTermsArguments& a, int64_t t, const Places& p, int64_t count, float share) {
  const Model<kind> model{reinterpret_cast<const Row*>(a.table)[t], a.clip ? 1.0f : __builtin_inff()};
  const float half = float(1.0 / double(a.levels - 1));
  if (t > 0) evaluate<gradient>(Divergence<kind>{model}, p, count, share);
  else if (a.exact_cdf) evaluate<gradient>(Decoder<kind, true>{model, half}, p, count, share);
  else evaluate<gradient>(Decoder<kind, false>{model, half}, p, count, share);
}
template <bool gradient>
DDPM_INLINE void evaluate(const VlbTermsArguments& a, int64_t t, const Places& p, int64_t count, float share) {
  switch (a.variance) {
    case Variance::fixed: return evaluate_kind<gradient, Variance::fixed>(a, t, p, count, share);
    case Variance::learned: return evaluate_kind<gradient, Variance::learned>(a, t, p, count, share);
    case Variance::learned_range: return evaluate_kind<gradient, Variance::learned_range>(a, t, p, count, share);
  }
}

constexpr double ln2 = 0.693147180559945309;

}  // namespace

void vlb_terms(const VlbTermsArguments& a) {
  const bool learned = a.variance != Variance::fixed, doubled = a.grad_model_output.stride > a.sizes.elements;
  const double bits = 1.0 / (double(a.sizes.elements) * ln2);  // of one element's nat
  sum_each_sample<State, 1>(
      a,
      [&](State& state, int64_t sample, int64_t first, int64_t count, double* total) {
        const int64_t offset = sample * a.sizes.elements + first, place = sample * a.model_output.stride + first;
        Places p{};
        p.x_start = read(a.x_start, offset, count, state.x_start);
        p.x_t = read(a.x_t, offset, count, state.x_t);
        p.prediction = read(a.model_output.view, place, count, state.prediction);
        p.raw = learned ? read(a.model_output.view, place + a.sizes.elements, count, state.raw) : p.prediction;
        p.value = state.value.values;
        if (!a.grad_model_output.view.data) {
          evaluate<false>(a, a.t[sample], p, count, 0.0f);
          *total += sum(p.value, count);
          return;
        }
        p.grad = a.detach_mean ? state.grad.values : place_for(a.grad_model_output.view, place, state.grad);
        p.grad_raw = learned ? place_for(a.grad_model_output.view, place + a.sizes.elements, state.grad_raw) : state.grad_raw.values;
        evaluate<true>(a, a.t[sample], p, count, (a.grad_terms ? a.grad_terms[sample] : 1.0f) * float(bits));
        if (a.detach_mean) write_zeros(a.grad_model_output.view, place, count);
        else write(a.grad_model_output.view, place, count, state.grad);
        if (learned) write(a.grad_model_output.view, place + a.sizes.elements, count, state.grad_raw);
        else if (doubled) write_zeros(a.grad_model_output.view, place + a.sizes.elements, count);
        if (a.terms) *total += sum(p.value, count);
      },
      [&](int64_t sample, const double* total) {
        if (a.terms) a.terms[sample] = float(*total * bits);
      });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
