// Tensor cores and asynchronous copies of sm_80 and later, for bf16, fp16 and fp32 alike.
//
// A step of a product's inner dimension is 32 bytes: 16 elements of 16 bits, or 8 of fp32. The fragments of mma.m16n8 are then
// the same words for all three types. With g = lane / 4 and t = lane % 4, a word being 4 bytes:
//   A (16 rows):     word t of row g, of row g + 8, word 4 + t of row g, of row g + 8
//   B (8 columns):   word t and word 4 + t of column g
//   C (16 x 8 fp32): columns 2t and 2t + 1 of row g, then of row g + 8
// fp32 goes through tf32 three times: x = big + small, and a b is taken as big big + big small + small big. What is dropped is
// at most 2^-21 of a product, about the size of fp32's own rounding in a sum. A tensor core cuts off, where fp32 arithmetic
// rounds, what does not fit when it adds to its accumulator (Fasi et al. 2021), so that the error of a sum kept there grows with
// its length. As Ootomo & Yokota 2022 do, fp32's sums are therefore kept in registers: an accumulator takes fp32_steps steps,
// corrections first, and is added to the sum with ordinary rounding. 16-bit types, whose results are rounded to 8 or 11 bits,
// need no such care.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ddpm_fast::cuda {

constexpr int warp_size = 32;
constexpr int chunk_bytes = 16;  // the widest access of a thread, and the row of an ldmatrix

template <typename T> constexpr bool is_fp32 = std::is_same_v<T, float>;
constexpr int fp32_steps = 2;  // of 8 products each

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Where not valid nothing is read and zeros are written; `from` must be an address all the same.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// Everything this thread has copied is there; for the other threads' copies a barrier must follow.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The words of a fragment; of fp32 the parts that the tensor core can take. `small` is not used for 16-bit types.
template <typename T, int words>
struct Fragment {
  uint32_t big[words], small[words];

  __device__ __forceinline__ void set(int i, uint32_t word) {
    if constexpr (is_fp32<T>) {
      big[i] = (word + 0x1000u) & 0xffffe000u;  // to the nearest of 10 bits of mantissa
      small[i] = __float_as_uint(__uint_as_float(word) - __uint_as_float(big[i]));  // NaN where x is NaN or infinite
    } else {
      big[i] = word;
    }
  }
};

// rest += what a.big b.big lacks of a b; nothing for 16-bit types.
template <typename T>
__device__ __forceinline__ void add_corrections(float (&rest)[4], const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
  if constexpr (is_fp32<T>) {
    mma<T>(rest, a.small, b.big);
    mma<T>(rest, a.big, b.small);
  }
}

// Two neighbours of a row as 16-bit values in one word.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

}  // namespace ddpm_fast::cuda
