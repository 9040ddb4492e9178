// Sums over a warp: every lane gets them, always in the same order.
#pragma once
#include <cstdint>

namespace ddpm_fast::cuda {

// x of the lane whose number differs in the bit `offset`; all lanes take part. __shfl_xor_sync moves x to an integer and back.
__device__ __forceinline__ float across(float x, int offset) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(other) : "f"(x), "r"(offset));
  return other;
}

// Over the lanes whose numbers differ in the bits from `low` to below `high`, both powers of two and the same in all lanes.
template <int rows, int columns> __device__ __forceinline__ void sum_over_lanes(float (&x)[rows][columns], int low, int high) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) {
    if (offset < low || offset >= high) continue;
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j) x[i][j] += across(x[i][j], offset);
  }
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) x += across(x, offset);
  return x;
}

}  // namespace ddpm_fast::cuda
