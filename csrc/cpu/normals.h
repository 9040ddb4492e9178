// The noise contract at the width of the registers: Philox by the 32 × 32 -> 64 bit multiplication that every instruction
// set has for the even words of a register, Box-Muller in a loop that the compiler vectorises.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

// A word lives in the low half of a 64-bit lane; what is above it is rubbish that the next multiplication ignores.
#if defined(__AVX512F__)
constexpr int words = 8;
#elif defined(__AVX2__)
constexpr int words = 4;
#else
constexpr int words = 2;
#endif
typedef uint64_t wide __attribute__((vector_size(8 * words)));
typedef float floats __attribute__((vector_size(8 * words)));

constexpr int counters_at_once = 2 * words;  // two registers, whose chains of multiplications run side by side
constexpr int normals_at_once = 4 * counters_at_once;

DDPM_INLINE wide everywhere(uint64_t x) { return wide{} + x; }

DDPM_INLINE wide multiply_words(wide a, wide b) {
#if defined(__AVX512F__)
  return (wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Of each group of four: a0 b0 a1 b1 from the first, a2 b2 a3 b3 from the second result.
DDPM_INLINE void interleave(floats a, floats b, floats& low, floats& high) {
#if defined(__AVX512F__)
  low = (floats)_mm512_unpacklo_ps((__m512)a, (__m512)b), high = (floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  low = (floats)_mm256_unpacklo_ps((__m256)a, (__m256)b), high = (floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  low = (floats)_mm_unpacklo_ps((__m128)a, (__m128)b), high = (floats)_mm_unpackhi_ps((__m128)a, (__m128)b);
#else
  low = floats{a[0], b[0], a[1], b[1]}, high = floats{a[2], b[2], a[3], b[3]};
#endif
}

// Four words of one counter a lane.
struct Counters { wide c0, c1, c2, c3; };

// The keys of the ten rounds, in memory: an instruction can take them from there to every lane.
struct RoundKeys {
  explicit RoundKeys(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& round : keys) {
      round[0] = k0, round[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
  uint64_t keys[10][2];
};

DDPM_INLINE void encipher(Counters (&counters)[2], const RoundKeys& rounds) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (Counters& c : counters) {
      const wide p0 = multiply_words(everywhere(0xD2511F53u), c.c0), p1 = multiply_words(everywhere(0xCD9E8D57u), c.c2);
      c = {(p1 >> 32) ^ c.c1 ^ everywhere(rounds.keys[round][0]), p1, (p0 >> 32) ^ c.c3 ^ everywhere(rounds.keys[round][1]), p0};
    }
  }
}

// The four normals of each counter in out, 4 a counter. Lane 2k of a register holds counter k, lane 2k + 1 counter
// words/2 + k: then what `interleave` gives lies in order.
DDPM_INLINE void normals_of(Counters (&counters)[2], const RoundKeys& rounds, float* out) {
  encipher(counters, rounds);
  constexpr int lanes = 2 * words;  // words of a pair side by side: of the first pair in the even lanes, of the second in the odd
  alignas(64) uint32_t radius[2][lanes], angle[2][lanes];
  alignas(64) float z[4][lanes];
  for (int k = 0; k < 2; ++k) {
    const wide r = (counters[k].c0 & 0xffffffffu) | (counters[k].c2 << 32), a = (counters[k].c1 & 0xffffffffu) | (counters[k].c3 << 32);
    std::memcpy(radius[k], &r, sizeof r);
    std::memcpy(angle[k], &a, sizeof a);
  }
  // Both registers in one body, which the scheduler interleaves: a single chain of roundings would leave the units idle.
#pragma omp simd
  for (int i = 0; i < lanes; ++i) {
    float a, b, c, d;
    box_muller(radius[0][i], angle[0][i], a, b);
    box_muller(radius[1][i], angle[1][i], c, d);
    z[0][i] = a, z[1][i] = b, z[2][i] = c, z[3][i] = d;
  }
  for (int k = 0; k < 2; ++k) {
    floats even, odd, low, high;
    std::memcpy(&even, z[2 * k], sizeof even);
    std::memcpy(&odd, z[2 * k + 1], sizeof odd);
    interleave(even, odd, low, high);
    std::memcpy(out + k * 2 * lanes, &low, sizeof low);
    std::memcpy(out + k * 2 * lanes + lanes, &high, sizeof high);
  }
}

// Place of lane i's counter among its register's.
constexpr int place(int lane) { return lane / 2 + lane % 2 * (words / 2); }

// Normals of elements [first, first + count) of one sample into out[0..count), rounded up to whole groups. `first` must be a
// multiple of 4.
DDPM_INLINE void normals(const NoiseKey& key, const RoundKeys& rounds, uint64_t sample, int64_t first, int64_t count, float* out) {
  wide index;
  for (int i = 0; i < words; ++i) index[i] = uint64_t(place(i));
  for (int64_t i = 0; i < count; i += normals_at_once) {
    const wide j = everywhere(uint32_t((first + i) / 4)) + index;
    const Counters start{j, everywhere(key.stream), everywhere(uint32_t(sample)), everywhere(sample >> 32)};
    Counters counters[2] = {start, start};
    counters[1].c0 += words;
    normals_of(counters, rounds, out + i);
  }
}

// The noise that a thread draws for its blocks. A sample of few counters would leave most of a register's lanes unused, so
// small samples are drawn many at a time and kept until their turn comes.
class Normals {
 public:
  static constexpr int64_t capacity = 1024;  // elements of a block; a multiple of normals_at_once

  Normals(const NoiseKey& key, const Sizes& sizes)
      : key_(key), rounds_(key.seed), samples_(sizes.samples), counters_((sizes.elements + 3) / 4),
        together_(capacity / 4 / (counters_ ? counters_ : 1)) {}

  // Normals of elements [first, first + count) of a sample of the batch, count <= capacity. Good until the next call.
  const float* draw(int64_t sample, int64_t first, int64_t count) {
    if (together_ < 4) {
      normals(key_, rounds_, key_.first_sample + uint64_t(sample), first, count, buffer_);
      return buffer_;
    }
    if (sample < held_ || sample >= held_ + together_) draw_together(sample);
    return buffer_ + 4 * counters_ * (sample - held_);
  }

 private:
  __attribute__((noinline)) void draw_together(int64_t sample) {
    held_ = sample;
    const int64_t left = samples_ - sample, total = counters_ * (left < together_ ? left : together_);
    int64_t n = 0, j = 0;
    for (int64_t done = 0; done < total; done += counters_at_once) {
      uint64_t js[counters_at_once], indices[counters_at_once];
      for (int i = 0; i < counters_at_once; ++i) {
        js[i] = uint64_t(j), indices[i] = key_.first_sample + uint64_t(sample + n);
        if (++j == counters_) j = 0, ++n;
      }
      Counters counters[2];
      for (int k = 0; k < 2; ++k) {
        wide at, index;
        for (int i = 0; i < words; ++i) at[i] = js[k * words + place(i)], index[i] = indices[k * words + place(i)];
        counters[k] = {at, everywhere(key_.stream), index, index >> 32};
      }
      normals_of(counters, rounds_, buffer_ + 4 * done);
    }
  }

  const NoiseKey key_;
  const RoundKeys rounds_;
  const int64_t samples_, counters_, together_;
  int64_t held_ = -capacity;
  alignas(64) float buffer_[capacity];
};

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
