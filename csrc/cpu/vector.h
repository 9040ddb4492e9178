// One register of fp32 values, whatever its width: loads and stores of every storage type, whole or in part, and sigmoids.
// Files that use it are compiled with contraction of a·b + c: what they compute is not part of the noise contract.
#pragma once
#include <initializer_list>

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

DDPM_INLINE Vec widen(VecHalf h, bfloat16_t) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (Vec)(__builtin_convertvector(h, VecWord) << 16);
#endif
}
// To nearest even. A NaN that arithmetic gave has the quiet bit, so that its upper half is one too.
DDPM_INLINE VecHalf narrow(Vec x, bfloat16_t) {
  const VecWord u = (VecWord)x;
#if defined(__AVX512F__)
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32((__m512i)u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_mask_add_epi32((__m512i)u, _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q),
                                                _mm512_add_epi32((__m512i)u, last), _mm512_set1_epi32(0x7fff));
  alignas(64) static constexpr uint16_t upper_halves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return (VecHalf)_mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(upper_halves), rounded));
#else
  const VecWord rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return __builtin_convertvector((VecWord)(x == x ? (VecInt)rounded : (VecInt)u) >> 16, VecHalf);
#endif
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
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float values[lanes];
  store(x, values);
  for (int width = lanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
#endif
}

// 1 / (1 + e^-x) within 4 ulp for each of some registers side by side, whose chains of operations overlap. x below -87, where e^-x
// leaves fp32's range, becomes -87: their product is next to nothing either way. NaN stays NaN. 2^t = 2^k 2^r, |r| <= ½, by a
// polynomial whose largest relative error is least.
// For a result that is rounded to bf16 at once, 1.4e-4, a thirtieth of its ulp, is close enough.
template <bool for_bfloat16, int registers> DDPM_INLINE void sigmoids(Vec (&x)[registers], Vec (&result)[registers]) {
  constexpr float least = -87.0f;
  Vec k[registers], r[registers], p[registers];
  for (int i = 0; i < registers; ++i) {
#if defined(__AVX512F__)
    x[i] = (Vec)_mm512_max_ps((__m512)all(least), (__m512)x[i]);  // of a number and NaN it gives the second
    const Vec t = x[i] * -1.44269504f;
    r[i] = (Vec)_mm512_reduce_ps((__m512)t, 0);
    k[i] = t - r[i];
#else
    constexpr float shift = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer in the low bits
    x[i] = x[i] < least ? all(least) : x[i];
    Vec t = x[i] * -1.44269504f;
    t = t < -126.0f ? all(-126.0f) : t;
    k[i] = t + shift;
    r[i] = t - (k[i] - shift);
#endif
  }
  const auto evaluate = [&](float highest, std::initializer_list<float> lower) {
    for (int i = 0; i < registers; ++i) p[i] = all(highest);
    for (const float c : lower)
      for (int i = 0; i < registers; ++i) p[i] = p[i] * r[i] + c;
  };
  if (for_bfloat16) evaluate(5.51716685e-2f, {2.42611125e-1f, 6.93260968e-1f, 0.999928057f});
  else evaluate(1.32764725e-3f, {9.67554096e-3f, 5.55071309e-2f, 2.40221202e-1f, 6.93146944e-1f, 1.00000012f});
  for (int i = 0; i < registers; ++i) {
#if defined(__AVX512F__)
    const Vec below = (Vec)_mm512_scalef_ps((__m512)p[i], (__m512)k[i]) + 1.0f, guess = (Vec)_mm512_rcp14_ps((__m512)below);
    result[i] = for_bfloat16 ? guess : guess + guess * (1.0f - below * guess);
#else
    result[i] = 1.0f / (p[i] * (Vec)(((VecInt)k[i] << 23) + 0x3f800000) + 1.0f);  // 2^k: the shift's own bits leave at the top
#endif
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
