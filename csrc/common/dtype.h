// Storage types of tensors and their conversion to and from fp32, the type all arithmetic is done in.
#pragma once
#include "philox.h"

namespace ddpm_fast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A contiguous tensor, (samples, elements of each): null where an optional one is absent.
struct View {
  void* data;
  DType dtype;
};

struct bfloat16_t { uint16_t bits; };
struct float16_t { uint16_t bits; };

#if !defined(__CUDACC__)
DDPM_INLINE float to_float(float x) { return x; }
DDPM_INLINE float to_float(bfloat16_t x) { return bits_to_float(uint32_t(x.bits) << 16); }

// Branch-free, so that loops over it vectorise on any instruction set. The product with 2^112 moves the exponent's bias
// and makes subnormal halves normal floats; infinities and NaN get the exponent that the product did not give them.
DDPM_INLINE float to_float(float16_t x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f) | special;
  return bits_to_float(bits | uint32_t(x.bits & 0x8000u) << 16);
}

DDPM_INLINE void from_float(float x, float& out) { out = x; }

// Round to nearest even; NaN stays NaN.
DDPM_INLINE void from_float(float x, bfloat16_t& out) {
  uint32_t u = float_to_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

// Round to nearest even. Values below the smallest normal half are rounded by adding a float whose last bit is worth a
// subnormal half's; the others by adding half an ulp in integer arithmetic.
DDPM_INLINE void from_float(float x, float16_t& out) {
  uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  uint32_t subnormal = float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000u;
  uint32_t half = u < 0x38800000u ? subnormal : normal;
  half = u >= 0x477ff000u ? 0x7c00u : half;
  half = u > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(half | sign);
}
#endif

}  // namespace ddpm_fast
