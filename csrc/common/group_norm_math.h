// group_norm's per-element formulas, for host and device.
#pragma once
#include "philox.h"

namespace ddpm_fast {

// The mask of a dropout: element (c, pixel) of a sample has word i % 4 of counter block i / 4 of its noise, where
// i = pixel * channels + c: channels run fastest, in either layout of the data.
DDPM_INLINE bool dropout_keeps(uint32_t word, uint32_t threshold) { return word >= threshold; }

// d/dz of z sigmoid(z), given the sigmoid; of floats or vectors of them.
template <typename Float> DDPM_INLINE Float silu_slope(Float z, Float sigmoid) { return sigmoid * (1.0f + z * (1.0f - sigmoid)); }

}  // namespace ddpm_fast
