// q_sample: x_t = signal[t] x_start + sigma[t] epsilon. Reads x_start (and epsilon where it is a tensor) once, writes x_t
// once. With NoiseSource::none the second term is left out: that is the gradient of the first.
#include "../common/diffusion_math.h"
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {

void q_sample(const QSampleArguments& a) {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_block(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t first, int64_t count) {
      const int64_t offset = sample * a.elements + first;
      const float signal = a.signal[a.t[sample]];
      alignas(64) float x[block_elements], epsilon[block_elements];
      load(static_cast<const T*>(a.x_start) + offset, count, x);
      if (a.source == NoiseSource::none) {
        for (int64_t i = 0; i < count; ++i) x[i] = signal * x[i];
      } else {
        const float sigma = a.sigma[a.t[sample]];
        if (a.source == NoiseSource::tensor) load(static_cast<const T*>(a.noise) + offset, count, epsilon);
        else normals(a.key, a.key.first_sample + uint64_t(sample), first, count, epsilon);
        for (int64_t i = 0; i < count; ++i) x[i] = q_sample_element(signal, sigma, x[i], epsilon[i]);
      }
      store(x, count, static_cast<T*>(a.out) + offset);
    });
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
