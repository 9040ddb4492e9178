// Tensors in memory and fp32 in registers: packs of 16 bytes, or of one element, and small tensors whose dtype is a run-time tag.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/dtype.h"

namespace ddpm_fast::cuda {

template <typename T> __device__ __forceinline__ float widen(T x) { return float(x); }
template <> __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }

// `size` neighbouring elements, as they lie in memory: 16 bytes, or a single element.
template <typename T, int size> struct Pack {
  static_assert(size * sizeof(T) == 16);
  using Word = std::conditional_t<sizeof(T) == 4, float, uint32_t>;  // floats as they are: PTX would count a move for each cast
  using Vector = std::conditional_t<sizeof(T) == 4, float4, uint4>;
  static constexpr int unit = 2;  // elements that are widened and narrowed together

  Word words[4];

  __device__ __forceinline__ void load(const T* from) {
    const Vector v = __ldg(reinterpret_cast<const Vector*>(from));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  __device__ __forceinline__ void store(T* to) const {
    __stwb(reinterpret_cast<Vector*>(to), Vector{words[0], words[1], words[2], words[3]});  // an assignment may be split in four
  }
  __device__ __forceinline__ void get(int u, float (&x)[unit]) const {
    if constexpr (std::is_same_v<T, float>) {
      x[0] = words[2 * u], x[1] = words[2 * u + 1];
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      x[0] = __uint_as_float(words[u] << 16), x[1] = __uint_as_float(words[u] & 0xffff0000u);
    } else {
      __half2 pair;
      memcpy(&pair, &words[u], sizeof pair);
      x[0] = __low2float(pair), x[1] = __high2float(pair);
    }
  }
  __device__ __forceinline__ void set(int u, const float (&x)[unit]) {
    if constexpr (std::is_same_v<T, float>) {
      words[2 * u] = x[0], words[2 * u + 1] = x[1];
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
      memcpy(&words[u], &pair, sizeof pair);
    } else {
      const __half2 pair = __floats2half2_rn(x[0], x[1]);
      memcpy(&words[u], &pair, sizeof pair);
    }
  }
};

template <typename T> struct Pack<T, 1> {
  static constexpr int unit = 1;

  T value;

  __device__ __forceinline__ void load(const T* from) { value = __ldg(from); }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void get(int, float (&x)[1]) const { x[0] = widen(value); }
  __device__ __forceinline__ void set(int, const float (&x)[1]) { value = narrow<T>(x[0]); }
};

// Element i of a small tensor, or `absent` where there is none.
__device__ __forceinline__ float read(const View& view, int64_t i, float absent) {
  if (!view.data) return absent;
  if (view.dtype == DType::float32) return __ldg(static_cast<const float*>(view.data) + i);
  if (view.dtype == DType::bfloat16) return widen(__ldg(static_cast<const __nv_bfloat16*>(view.data) + i));
  return widen(__ldg(static_cast<const __half*>(view.data) + i));
}

// Nothing is written where there is no tensor.
__device__ __forceinline__ void write(const View& view, int64_t i, float x) {
  if (!view.data) return;
  if (view.dtype == DType::float32) static_cast<float*>(view.data)[i] = x;
  else if (view.dtype == DType::bfloat16) static_cast<__nv_bfloat16*>(view.data)[i] = narrow<__nv_bfloat16>(x);
  else static_cast<__half*>(view.data)[i] = narrow<__half>(x);
}

}  // namespace ddpm_fast::cuda
