// One register of fp32 values, whatever its width: loads and stores of every storage type, whole or in part, and a sigmoid.
// Files that use it are compiled with contraction of a·b + c: what they compute is not part of the noise contract.
#pragma once
#include "normals.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int lanes = 2 * words;
typedef floats Vec;
typedef int32_t VecInt __attribute__((vector_size(4 * lanes)));
typedef uint32_t VecWord __attribute__((vector_size(4 * lanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * lanes)));

DDPM_INLINE Vec all(float x) { return Vec{} + x; }
DDPM_INLINE Vec select(VecInt condition, Vec a, Vec b) { return condition ? a : b; }

DDPM_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
DDPM_INLINE void store(Vec x, float* p) { std::memcpy(p, &x, sizeof x); }

DDPM_INLINE Vec widen(VecHalf h, bfloat16_t) { return (Vec)(__builtin_convertvector(h, VecWord) << 16); }
DDPM_INLINE VecHalf narrow(Vec x, bfloat16_t) {  // as from_float: round to nearest even, NaN stays NaN
  const VecWord u = (VecWord)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((VecWord)(x == x ? (VecInt)rounded : (VecInt)((u >> 16) | 0x40u)), VecHalf);
}
DDPM_INLINE Vec widen(VecHalf h, float16_t) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#else
  Vec x;
  for (int i = 0; i < lanes; ++i) x[i] = to_float(float16_t{h[i]});
  return x;
#endif
}
DDPM_INLINE VecHalf narrow(Vec x, float16_t) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecHalf h;
  for (int i = 0; i < lanes; ++i) {
    float16_t rounded;
    from_float(x[i], rounded);
    h[i] = rounded.bits;
  }
  return h;
#endif
}
template <typename T> DDPM_INLINE Vec load(const T* p) {
  VecHalf h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <typename T> DDPM_INLINE void store(Vec x, T* p) {
  const VecHalf h = narrow(x, T{});
  std::memcpy(p, &h, sizeof h);
}

// The first `count` lanes; the others get `rest`, or are not stored. Nothing beyond them is touched.
DDPM_INLINE VecInt first_lanes(int count) {
  VecInt index;
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index < count;
}
#if defined(__AVX512F__)
DDPM_INLINE Vec load(const float* p, int count, Vec rest) {
  return (Vec)_mm512_mask_loadu_ps((__m512)rest, __mmask16((1u << count) - 1), p);
}
DDPM_INLINE void store(Vec x, float* p, int count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x); }
DDPM_INLINE VecHalf load_halves(const void* p, int count) { return (VecHalf)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p); }
DDPM_INLINE void store_halves(VecHalf h, void* p, int count) { _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)h); }
#else
DDPM_INLINE Vec load(const float* p, int count, Vec rest) {
  for (int i = 0; i < count; ++i) rest[i] = p[i];
  return rest;
}
DDPM_INLINE void store(Vec x, float* p, int count) {
  for (int i = 0; i < count; ++i) p[i] = x[i];
}
DDPM_INLINE VecHalf load_halves(const void* p, int count) {
  VecHalf h{};
  for (int i = 0; i < count; ++i) h[i] = static_cast<const uint16_t*>(p)[i];
  return h;
}
DDPM_INLINE void store_halves(VecHalf h, void* p, int count) {
  for (int i = 0; i < count; ++i) static_cast<uint16_t*>(p)[i] = h[i];
}
#endif
template <typename T> DDPM_INLINE Vec load(const T* p, int count, Vec rest) {
  return select(first_lanes(count), widen(load_halves(p, count), T{}), rest);
}
template <typename T> DDPM_INLINE void store(Vec x, T* p, int count) { store_halves(narrow(x, T{}), p, count); }

DDPM_INLINE float sum_of(Vec x) {
  float values[lanes];
  store(x, values);
  for (int width = lanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// 1 / x within an ulp, for 1 <= x <= e^87.
DDPM_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x) within 2 ulp; for x below -87 what it is at -87, no more than 1.7e-38. NaN stays NaN.
DDPM_INLINE Vec sigmoid(Vec x) {
  constexpr float limit = 87.0f, shift = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer in the low bits
  Vec u = x < -limit ? all(limit) : -x;
  u = u < -limit ? all(-limit) : u;
  const Vec t = u * 1.44269504f + shift, k = t - shift;
  const Vec r = (u - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = (Vec)(((VecInt)t << 23) + 0x3f800000);  // 2^k: the shift's own bits leave at the top
  return reciprocal(p * power + 1.0f);
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
