// simple_loss: weight[t] mean (out - (x_start_coef[t] x_start + noise_coef[t] epsilon))², one value a sample. Reads the
// prediction once, x_start and epsilon where their coefficients are not 0; epsilon is drawn, never stored. Writes the loss, the
// gradient of out (for the gradient of the loss given, or for ones), or both in one pass.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct State {
  explicit State(const SimpleLossArguments& a) : epsilon(a.noise, a.sizes) {}
  Epsilon epsilon;
  Buffer prediction, x_start, result, grad;
};

// out - target of one block. A term whose coefficient is 0 is neither read nor drawn.
DDPM_INLINE void residual(const SimpleLossArguments& a, State& state, int64_t sample, int64_t first, int64_t count, float* result) {
  const float c0 = a.x_start_coef[a.t[sample]], c1 = a.noise_coef[a.t[sample]];
  const float* const p = read(a.model_output.view, sample * a.model_output.stride + first, count, state.prediction);
  const float* const x = c0 != 0.0f ? read(a.x_start, sample * a.sizes.elements + first, count, state.x_start) : nullptr;
  const float* const e = c1 != 0.0f ? state.epsilon.block(sample, first, count) : nullptr;
  if (x && e) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = p[i] - q_sample_element(c0, c1, x[i], e[i]);
  } else if (e) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = p[i] - mul_rn(c1, e[i]);
  } else if (x) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = p[i] - mul_rn(c0, x[i]);
  } else if (p != result) {
    std::memcpy(result, p, size_t(count) * sizeof(float));
  }
}

}  // namespace

void simple_loss(const SimpleLossArguments& a) {
  const float share = float(2.0 / double(a.sizes.elements));
  sum_each_sample<State, 1>(
      a,
      [&](State& state, int64_t sample, int64_t first, int64_t count, double* total) {
        float* const r = state.result.values;
        residual(a, state, sample, first, count, r);
        if (a.grad_model_output.view.data) {
          const int64_t place = sample * a.grad_model_output.stride + first;
          const float weight = a.weight[a.t[sample]] * share, scale = a.grad_loss ? a.grad_loss[sample] * weight : weight;
          float* const grad = place_for(a.grad_model_output.view, place, state.grad);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) grad[i] = mul_rn(scale, r[i]);
          write(a.grad_model_output.view, place, count, state.grad);
          if (a.grad_model_output.stride > a.sizes.elements) write_zeros(a.grad_model_output.view, place + a.sizes.elements, count);
        }
        if (!a.loss) return;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) r[i] = mul_rn(r[i], r[i]);
        *total += sum(r, count);
      },
      [&, mean = 1.0 / double(a.sizes.elements)](int64_t sample, const double* total) {
        if (a.loss) a.loss[sample] = a.weight[a.t[sample]] * float(*total * mean);
      });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
