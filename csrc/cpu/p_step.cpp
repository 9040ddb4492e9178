// p_step: one reverse step by a row of a sampler's table,
//   x̂0 = clip(from_x_t x_t + from_out out),   x' = x_start x̂0 + x_t_coef x_t + previous x̂0_previous + noise e^(½ log_variance) z.
// Reads each input once and writes each result once; results may lie where an input does. Backward recomputes x̂0, z and the
// deviation, and writes the gradients that are wanted.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct Row {
  float from_x_t, from_out, x_start, x_t, previous, low, high, noise;  // COLUMNS in ddpm_fast/ops/_p_step.py
};

struct State {
  explicit State(const PStepArguments& a) : epsilon(a.noise, a.sizes) {}
  Epsilon epsilon;
  Buffer x_t, prediction, without, raw, previous, start, next, deviation, grad_next, grad_start;
};

struct Block {
  const PStepArguments& a;
  State& state;
  const int64_t sample, first, count;
  const Row row = reinterpret_cast<const Row*>(a.table)[a.t[sample]];
  const int64_t offset = sample * a.sizes.elements + first;
  const float limit = a.clip ? 1.0f : __builtin_inff();

  DDPM_METHOD const float* x_t() const { return read(a.x_t, offset, count, state.x_t); }

  // The prediction, guided where there is an output without the condition.
  DDPM_METHOD const float* prediction() const {
    const float* const with = read(a.model_output.view, sample * a.model_output.stride + first, count, state.prediction);
    if (!a.without.view.data) return with;
    const float* const without = read(a.without.view, sample * a.without.stride + first, count, state.without);
    float* const guided = state.without.values;
    const float scale = a.guidance;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) guided[i] = add_rn(without[i], mul_rn(scale, with[i] - without[i]));
    return guided;
  }

  DDPM_METHOD bool noisy() const { return a.noise.present && row.noise != 0.0f; }

  DDPM_METHOD const float* raw() const {
    return read(a.model_output.view, sample * a.model_output.stride + a.sizes.elements + first, count, state.raw);
  }
  DDPM_METHOD float fixed_deviation() const { return mul_rn(row.noise, deviation(row.low)); }
};

// noise e^(½ log_variance) for one element's raw output.
template <Variance kind>
DDPM_INLINE float learned_deviation(float noise, float low, float high, float raw) {
  return mul_rn(noise, deviation(log_variance_element(kind, low, high, raw)));
}
template <Variance kind>
DDPM_INLINE void write_deviations(const Row row, const float* raw, int64_t count, float* result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) result[i] = learned_deviation<kind>(row.noise, row.low, row.high, raw[i]);
}
template <Variance kind>
DDPM_INLINE void add_noise(const Row row, const float* raw, const float* z, int64_t count, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = add_rn(x[i], mul_rn(learned_deviation<kind>(row.noise, row.low, row.high, raw[i]), z[i]));
}

// x̂0, and the mean of x', to which the noise of a fixed variance may be added at once.
template <bool noisy>
DDPM_INLINE void start_and_next(const Row row, float limit, const float* x, const float* p, const float* z, float deviation, int64_t count,
                                float* start, float* next) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float guess = clamp(add_rn(mul_rn(row.from_x_t, x[i]), mul_rn(row.from_out, p[i])), -limit, limit);
    const float mean = add_rn(mul_rn(row.x_start, guess), mul_rn(row.x_t, x[i]));
    start[i] = guess;
    next[i] = noisy ? add_rn(mean, mul_rn(deviation, z[i])) : mean;
  }
}

DDPM_INLINE void forward(const Block& b) {
  const PStepArguments& a = b.a;
  const Row& row = b.row;
  const float *const x = b.x_t(), *const p = b.prediction();
  const float* const previous = a.x_start_previous.data ? read(a.x_start_previous, b.offset, b.count, b.state.previous) : nullptr;
  const float* const z = b.noisy() ? b.state.epsilon.block(b.sample, b.first, b.count) : nullptr;
  // In fp32 the results go where they belong. What they may overlay is read at the same index first: x̂0_previous by the loop
  // that makes x̂0, x_t by the loop that makes x'.
  float* const start = a.x_start.data ? place_for(a.x_start, b.offset, b.state.start) : b.state.start.values;
  float* const next = place_for(a.x_next, b.offset, b.state.next);
  float* const history = b.state.deviation.values;
  if (previous) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) history[i] = mul_rn(row.previous, previous[i]);
  }
  const bool fixed = z && a.variance == Variance::fixed, usual = fixed && !previous;  // the usual step is one loop
  const float deviation = fixed ? b.fixed_deviation() : 0.0f;
  if (usual) start_and_next<true>(row, b.limit, x, p, z, deviation, b.count, start, next);
  else start_and_next<false>(row, b.limit, x, p, z, deviation, b.count, start, next);
  if (previous) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) next[i] = add_rn(next[i], history[i]);
  }
  if (fixed && !usual) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) next[i] = add_rn(next[i], mul_rn(deviation, z[i]));
  } else if (z && a.variance == Variance::learned) {
    add_noise<Variance::learned>(row, b.raw(), z, b.count, next);
  } else if (z && a.variance == Variance::learned_range) {
    add_noise<Variance::learned_range>(row, b.raw(), z, b.count, next);
  }
  if (a.x_start.data) write(a.x_start, b.offset, b.count, b.state.start);
  write(a.x_next, b.offset, b.count, b.state.next);
}

// One of the gradients, element by element, where it is wanted.
template <typename Function>
DDPM_INLINE void write_gradient(const View& view, int64_t offset, int64_t count, Buffer& buffer, const Function& value) {
  if (!view.data) return;
  float* const grad = place_for(view, offset, buffer);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad[i] = value(i);
  write(view, offset, count, buffer);
}

DDPM_INLINE void backward(const Block& b) {
  const PStepArguments& a = b.a;
  const Row& row = b.row;
  const int64_t count = b.count, offset = b.offset;
  float *const g = b.state.next.values, *const g_start = b.state.start.values;
  std::memset(g, 0, size_t(count) * sizeof(float));
  if (a.grad_x_next.data) std::memcpy(g, read(a.grad_x_next, offset, count, b.state.grad_next), size_t(count) * sizeof(float));
  const float* const given = a.grad_x_start.data ? read(a.grad_x_start, offset, count, b.state.grad_start) : nullptr;
  const float *const x = b.x_t(), *const p = b.prediction();
  const bool clip = a.clip;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float guess = add_rn(mul_rn(row.from_x_t, x[i]), mul_rn(row.from_out, p[i]));
    g_start[i] = mul_rn(mul_rn(row.x_start, g[i]) + (given ? given[i] : 0.0f), clip ? passes(guess, 1.0f) : 1.0f);
  }
  const float with = a.without.view.data ? row.from_out * a.guidance : row.from_out, without = row.from_out - with;
  Buffer& buffer = b.state.grad_next;  // free from here on
  write_gradient(a.grad_x_t, offset, count, buffer,
                 [&](int64_t i) { return add_rn(mul_rn(row.x_t, g[i]), mul_rn(row.from_x_t, g_start[i])); });
  write_gradient(a.grad_x_start_previous, offset, count, buffer, [&](int64_t i) { return mul_rn(row.previous, g[i]); });
  write_gradient(a.grad_without.view, b.sample * a.grad_without.stride + b.first, count, buffer,
                 [&](int64_t i) { return mul_rn(without, g_start[i]); });
  const int64_t place = b.sample * a.grad_model_output.stride + b.first;
  write_gradient(a.grad_model_output.view, place, count, buffer, [&](int64_t i) { return mul_rn(with, g_start[i]); });

  const bool doubled = a.grad_model_output.view.data && a.grad_model_output.stride > a.sizes.elements,
             learned = a.variance != Variance::fixed;
  if (a.grad_without.view.data && a.grad_without.stride > a.sizes.elements)
    write_zeros(a.grad_without.view, b.sample * a.grad_without.stride + a.sizes.elements + b.first, count);
  if (!b.noisy()) {
    if (doubled) write_zeros(a.grad_model_output.view, place + a.sizes.elements, count);
    if (a.grad_noise.data) write_zeros(a.grad_noise, offset, count);
    return;
  }
  if (learned) {
    const float slope = 0.5f * log_variance_slope(a.variance, row.low, row.high);
    float* const deviation = b.state.deviation.values;
    if (a.variance == Variance::learned) write_deviations<Variance::learned>(row, b.raw(), count, deviation);
    else write_deviations<Variance::learned_range>(row, b.raw(), count, deviation);
    const float* const z = b.state.epsilon.block(b.sample, b.first, count);
    write_gradient(a.grad_noise, offset, count, buffer, [&](int64_t i) { return mul_rn(deviation[i], g[i]); });
    if (doubled)
      write_gradient(a.grad_model_output.view, place + a.sizes.elements, count, buffer,
                     [&](int64_t i) { return mul_rn(mul_rn(slope, deviation[i]), mul_rn(z[i], g[i])); });
  } else {
    const float deviation = b.fixed_deviation();
    write_gradient(a.grad_noise, offset, count, buffer, [&](int64_t i) { return mul_rn(deviation, g[i]); });
    if (doubled) write_zeros(a.grad_model_output.view, place + a.sizes.elements, count);
  }
}

}  // namespace

void p_step(const PStepArguments& a) {
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) { forward({a, state, sample, first, count}); });
}

void p_step_backward(const PStepArguments& a) {
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) { backward({a, state, sample, first, count}); });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
