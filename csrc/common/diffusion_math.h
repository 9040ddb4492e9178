// The per-element formulas of the method, for host and device.
#pragma once
#include "philox.h"

namespace ddpm_fast {

// x_t = signal x_start + sigma epsilon (Ho et al. 2020, eq. 4; with the single step's tables, eq. 2).
DDPM_INLINE float q_sample_element(float signal, float sigma, float x_start, float epsilon) {
  return add_rn(mul_rn(signal, x_start), mul_rn(sigma, epsilon));
}

}  // namespace ddpm_fast
