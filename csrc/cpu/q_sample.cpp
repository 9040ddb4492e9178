// q_sample: x_t = signal[t] x_start + sigma[t] epsilon. Reads x_start (and epsilon where it is a tensor) once, writes x_t
// once. Without noise the second term is left out: that is the gradient of the first.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {

namespace {

struct State {
  explicit State(const QSampleArguments& a) : epsilon(a.noise, a.sizes) {}
  Epsilon epsilon;
  Buffer x_start, out;
};

}  // namespace

void q_sample(const QSampleArguments& a) {
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) {
    const int64_t place = sample * a.out.stride + first, row = a.t ? a.t[sample] : sample;
    const float signal = a.signal[row];
    const float* const x = read(a.x_start.view, sample * a.x_start.stride + first, count, state.x_start);
    float* const out = place_for(a.out.view, place, state.out);
    if (a.noise.present) {
      const float sigma = a.sigma[row];
      const float* const epsilon = state.epsilon.block(sample, first, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = q_sample_element(signal, sigma, x[i], epsilon[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = mul_rn(signal, x[i]);
    }
    write(a.out.view, place, count, state.out);
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
