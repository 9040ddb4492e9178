// gaussian_kl: KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) in nats, elementwise or the mean over each sample. Reads each
// operand once; one that is broadcast is read where it lies. Backward recomputes the exponentials and writes the gradients
// that are wanted.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct State {
  explicit State(const GaussianKLArguments&) {}
  Buffer mean1, logvar1, mean2, logvar2, result, grad;
};

// Elements of an operand; one value for the whole sample is repeated.
DDPM_INLINE const float* operand(const Broadcast& b, int64_t sample, int64_t first, int64_t count, Buffer& buffer) {
  const float* const values = read(b.view, sample * b.sample_stride + first * b.element_stride, b.element_stride ? count : 1, buffer);
  if (b.element_stride) return values;
  const float value = values[0];
  for (int64_t i = 0; i < count; ++i) buffer.values[i] = value;
  return buffer.values;
}

struct Operands {
  const float *mean1, *logvar1, *mean2, *logvar2;
};

DDPM_INLINE Operands operands(const GaussianKLArguments& a, State& state, int64_t sample, int64_t first, int64_t count) {
  return {operand(a.mean1, sample, first, count, state.mean1), operand(a.logvar1, sample, first, count, state.logvar1),
          operand(a.mean2, sample, first, count, state.mean2), operand(a.logvar2, sample, first, count, state.logvar2)};
}

DDPM_INLINE void divergences(const Operands o, int64_t count, float* kl) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    kl[i] = kl_element(excess_of(o.logvar1[i] - o.logvar2[i]).beyond_linear, mul_rn(o.mean1[i] - o.mean2[i], inverse_deviation(o.logvar2[i])));
  }
}

}  // namespace

void gaussian_kl(const GaussianKLArguments& a) {
  if (!a.reduced) {
    for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) {
      const int64_t offset = sample * a.sizes.elements + first;
      divergences(operands(a, state, sample, first, count), count, place_for(a.kl, offset, state.result));
      write(a.kl, offset, count, state.result);
    });
    return;
  }
  sum_each_sample<State>(
      a,
      [&](State& state, int64_t sample, int64_t first, int64_t count) {
        divergences(operands(a, state, sample, first, count), count, state.result.values);
        return sum(state.result.values, count);
      },
      [&](int64_t sample, double total) {
        Buffer mean;
        *place_for(a.kl, sample, mean) = float(total / double(a.sizes.elements));
        write(a.kl, sample, 1, mean);
      });
}

void gaussian_kl_backward(const GaussianKLArguments& a) {
  const float share = a.reduced ? float(1.0 / double(a.sizes.elements)) : 1.0f;
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) {
    const Operands o = operands(a, state, sample, first, count);
    const Broadcast given = {a.grad_kl, a.reduced ? 1 : a.sizes.elements, a.reduced ? 0 : 1};
    const float* const g = operand(given, sample, first, count, state.grad);
    const int64_t offset = sample * a.sizes.elements + first;
    // What all four gradients follow from.
    float *const growth = state.result.values, *const pull = state.mean2.values, *const square = state.mean1.values;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float inverse = inverse_deviation(o.logvar2[i]), distance = mul_rn(o.mean1[i] - o.mean2[i], inverse), scale = mul_rn(g[i], share);
      growth[i] = mul_rn(scale, excess_of(o.logvar1[i] - o.logvar2[i]).growth);
      pull[i] = mul_rn(scale, mul_rn(distance, inverse));
      square[i] = mul_rn(scale, mul_rn(mul_rn(0.5f, distance), distance));
    }
    const auto put = [&](int k, const auto& value) {
      if (!a.grads[k].data) return;
      float* const grad = place_for(a.grads[k], offset, state.grad);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] = value(i);
      write(a.grads[k], offset, count, state.grad);
    };
    put(0, [&](int64_t i) { return pull[i]; });
    put(1, [&](int64_t i) { return growth[i]; });
    put(2, [&](int64_t i) { return -pull[i]; });
    put(3, [&](int64_t i) { return -add_rn(growth[i], square[i]); });
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
