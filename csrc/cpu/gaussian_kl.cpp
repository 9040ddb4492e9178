// gaussian_kl: KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) in nats, elementwise or the mean over each sample. Reads each
// operand once; one that is broadcast is read where it lies, and its gradient summed over the sample. Writes the divergence,
// the gradients that are wanted (for the gradient of the divergence given, or for ones), or both in one pass.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

struct State {
  explicit State(const GaussianKLArguments&) {}
  Buffer mean1, logvar1, mean2, logvar2, value, upstream, grads[4];
};

// Elements of an operand; one value for the whole sample is repeated.
DDPM_INLINE const float* operand(const Broadcast& b, int64_t sample, int64_t first, int64_t count, Buffer& buffer) {
  const float* const values = read(b.view, sample * b.sample_stride + first * b.element_stride, b.element_stride ? count : 1, buffer);
  if (b.element_stride) return values;
  const float value = values[0];
  for (int64_t i = 0; i < count; ++i) buffer.values[i] = value;
  return buffer.values;
}

struct Operands { const float *mean1, *logvar1, *mean2, *logvar2; };

DDPM_INLINE Operands operands(const GaussianKLArguments& a, State& state, int64_t sample, int64_t first, int64_t count) {
  return {operand(a.mean1, sample, first, count, state.mean1), operand(a.logvar1, sample, first, count, state.logvar1),
          operand(a.mean2, sample, first, count, state.mean2), operand(a.logvar2, sample, first, count, state.logvar2)};
}

DDPM_INLINE void divergences(const Operands o, int64_t count, float* value) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float distance = mul_rn(o.mean1[i] - o.mean2[i], inverse_deviation(o.logvar2[i]));
    value[i] = kl_element(excess_of(o.logvar1[i] - o.logvar2[i]).beyond_linear, distance);
  }
}

// The same and the gradients of all four, times the upstream: of each element, or one for all.
struct Places { float *value, *mean1, *logvar1, *mean2, *logvar2; };

template <bool elementwise>
DDPM_INLINE void divergences_and_gradients(const Operands o, const float* upstream, int64_t count, const Places p) {
  const float same = *upstream;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = inverse_deviation(o.logvar2[i]), distance = mul_rn(o.mean1[i] - o.mean2[i], inverse);
    const Excess excess = excess_of(o.logvar1[i] - o.logvar2[i]);
    const float g = elementwise ? upstream[i] : same, pull = mul_rn(g, mul_rn(distance, inverse));
    p.value[i] = kl_element(excess.beyond_linear, distance);
    p.mean1[i] = pull;
    p.logvar1[i] = mul_rn(g, excess.growth);
    p.mean2[i] = -pull;
    p.logvar2[i] = mul_rn(-g, add_rn(excess.growth, mul_rn(mul_rn(0.5f, distance), distance)));
  }
}

// One block: its divergences, and the gradients that are wanted. totals: the sum of the divergences, then of the gradients of
// operands with one value a sample.
DDPM_INLINE void block(const GaussianKLArguments& a, State& state, int64_t sample, int64_t first, int64_t count, float* value,
                       double* totals) {
  const int64_t offset = sample * a.sizes.elements + first;
  const Operands o = operands(a, state, sample, first, count);
  const Broadcast* const operand[4] = {&a.mean1, &a.logvar1, &a.mean2, &a.logvar2};
  float* grads[4];
  bool wanted = false, whole[4];
  for (int k = 0; k < 4; ++k) {
    whole[k] = a.grads[k].data && operand[k]->element_stride;
    grads[k] = whole[k] ? place_for(a.grads[k], offset, state.grads[k]) : state.grads[k].values;
    wanted = wanted || a.grads[k].data;
  }
  if (!wanted) return divergences(o, count, value);
  const Places p{value, grads[0], grads[1], grads[2], grads[3]};
  if (a.reduced) {
    const float scale = (a.grad_kl.data ? *read(a.grad_kl, sample, 1, state.upstream) : 1.0f) * float(1.0 / double(a.sizes.elements));
    divergences_and_gradients<false>(o, &scale, count, p);
  } else {
    divergences_and_gradients<true>(o, read(a.grad_kl, offset, count, state.upstream), count, p);
  }
  for (int k = 0; k < 4; ++k) {
    if (whole[k]) write(a.grads[k], offset, count, state.grads[k]);
    else if (a.grads[k].data) totals[1 + k] += sum(grads[k], count);
  }
}

}  // namespace

void gaussian_kl(const GaussianKLArguments& a) {
  sum_each_sample<State, 5>(
      a,
      [&](State& state, int64_t sample, int64_t first, int64_t count, double* totals) {
        const bool elementwise = a.kl.data && !a.reduced;
        const int64_t offset = sample * a.sizes.elements + first;
        float* const value = elementwise ? place_for(a.kl, offset, state.value) : state.value.values;
        block(a, state, sample, first, count, value, totals);
        if (elementwise) write(a.kl, offset, count, state.value);
        else if (a.kl.data) totals[0] += sum(value, count);
      },
      [&, share = 1.0 / double(a.sizes.elements)](int64_t sample, const double* totals) {
        const Broadcast* const operand[4] = {&a.mean1, &a.logvar1, &a.mean2, &a.logvar2};
        for (int k = 0; k < 4; ++k)
          if (a.grads[k].data && !operand[k]->element_stride) static_cast<float*>(a.grads[k].data)[sample] = float(totals[1 + k]);
        if (!a.kl.data || !a.reduced) return;
        Buffer mean;
        *place_for(a.kl, sample, mean) = float(totals[0] * share);
        write(a.kl, sample, 1, mean);
      });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
