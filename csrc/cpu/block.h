// Blocks: the unit of work of every elementwise kernel. A block is a run of elements of one sample; its storage type is
// turned into fp32 in a buffer that stays in the first-level cache, its noise is drawn into another.
#pragma once
#include "parallel.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int64_t block_elements = 1024;  // 4 KiB a buffer; a multiple of normals_at_once
constexpr int lanes = 16;                 // counter blocks drawn side by side: one AVX-512 register, two AVX2 ones
constexpr int normals_at_once = 4 * lanes;

// Normals of elements [first, first + count) of one sample into out[0..count), rounded up to whole groups: out must hold
// block_elements. `first` must be a multiple of 4.
DDPM_INLINE void normals(const NoiseKey& key, uint64_t sample, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += normals_at_once) {
    float z[4][lanes];
    const uint32_t j = uint32_t((first + i) / 4);
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      float z0, z1, z2, z3;
      normal4(key, sample, j + uint32_t(lane), z0, z1, z2, z3);
      z[0][lane] = z0; z[1][lane] = z1; z[2][lane] = z2; z[3][lane] = z3;
    }
    for (int lane = 0; lane < lanes; ++lane)
      for (int k = 0; k < 4; ++k) out[i + 4 * lane + k] = z[k][lane];
  }
}

template <typename T>
DDPM_INLINE void load(const T* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

template <typename T>
DDPM_INLINE void store(const float* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) from_float(in[i], out[i]);
}

// Calls body(sample, first, count) for each block of each sample.
template <typename Body>
void for_each_block(int64_t samples, int64_t elements, int threads, const Body& body) {
  const int64_t per_sample = (elements + block_elements - 1) / block_elements;
  parallel_for(samples * per_sample, samples * elements, threads, [&](int64_t block) {
    const int64_t sample = block / per_sample, first = block % per_sample * block_elements;
    body(sample, first, elements - first < block_elements ? elements - first : block_elements);
  });
}

// Calls function(T{}) for the storage type that `dtype` names.
template <typename Function>
DDPM_INLINE void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32: return function(float{});
    case DType::bfloat16: return function(bfloat16_t{});
    case DType::float16: return function(float16_t{});
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
