// Tiles of attention: some tokens' channels of one head in shared memory, and the two products that are taken of them.
// A warp owns 16 rows of every product, so that softmax, its gradient and the rounding of P stay in its registers.
#pragma once
#include <cmath>
#include <initializer_list>

#include "attention.h"
#include "launch.h"
#include "mma.cuh"

namespace ddpm_fast::cuda {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

constexpr int rows_of_warp = 16;                // of an mma
constexpr int64_t largest_grid_x = 0x7fffffff;  // the hardware's limit

// Head sizes that there are kernels for. Channels up to the next one are read as zero and never stored.
constexpr int pad_channels(int64_t head_channels) {
  return head_channels <= 32 ? 32 : head_channels <= 64 ? 64 : head_channels <= 128 ? 128 : 256;
}

// Rows of D values in shared memory. The 16-byte chunks of a row are permuted by the row's number, so that the same chunk of
// eight rows, what ldmatrix reads and a fragment writes, lies in eight different groups of banks. Only the last three bits of
// a chunk's number change, so that the others are constants in an address.
template <typename T, int D>
struct Tile {
  static constexpr uint32_t chunk = chunk_bytes / sizeof(T);  // values of one
  static constexpr uint32_t chunks = D / chunk;
  T* data;

  __device__ __forceinline__ T* at(uint32_t row, uint32_t c) const {
    const uint32_t mixed = chunks >= 8 ? row % 8 : row / 2 % 4;  // rows of 64 bytes: two fill the banks once
    return data + (row * D + c / 8 * 8 * chunk + (c % 8 ^ mixed) * chunk);
  }
  __device__ __forceinline__ Tile from(int row) const { return {data + row * D}; }  // row: a multiple of 8
};

// threadIdx.x; in fp32 the compiler cannot know that it is the same in every turn of a loop: what follows from it is computed
// anew, a few instructions a tile, in place of being held in registers that the sums need.
template <typename T>
__device__ __forceinline__ uint32_t thread_anew() {
  uint32_t thread = threadIdx.x;
  if constexpr (is_fp32<T>) asm volatile("" : "+r"(thread));
  return thread;
}

// One head's rows in global memory, `stride` values apart. Rows from `rows` on and channels from `channels` on do not exist.
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride, rows;
  int channels;
};

// Starts to copy rows first .. first + count of a head; what does not exist becomes zero.
template <int count, int threads, typename T, int D>
__device__ __forceinline__ void load_tile(Tile<T, D> tile, const HeadRows<const T>& head, int64_t first) {
  constexpr uint32_t chunks = Tile<T, D>::chunks, rows_at_once = threads / chunks;
  static_assert(threads % chunks == 0 && count % rows_at_once == 0, "every thread copies one chunk of as many rows");
  const uint32_t thread = thread_anew<T>(), row = thread / chunks, c = thread % chunks;
  const bool channels_exist = c * Tile<T, D>::chunk < uint32_t(head.channels);
  const T* source = head.data + (first + row) * head.stride + c * Tile<T, D>::chunk;
#pragma unroll 4
  for (uint32_t i = 0; i < count; i += rows_at_once) {
    const bool valid = channels_exist && first + row + i < head.rows;
    copy_async_16(tile.at(row + i, c), valid ? source : head.data, valid);
    source += rows_at_once * head.stride;
  }
}

// products = rows columnsᵀ for the warp's 16 rows and N rows of `columns`.
template <typename T, int D, int N>
__device__ __forceinline__ void multiply_transposed(float (&products)[N / 8][4], Tile<T, D> rows, Tile<T, D> columns) {
  const uint32_t lane = thread_anew<T>() % warp_size;
  float rest[N / 8][4] = {};
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) products[n][i] = 0;
#pragma unroll(is_fp32<T> ? 1 : 2)
  for (uint32_t c = 0; c < Tile<T, D>::chunks; c += 4) {  // two steps of 32 bytes, so that one ldmatrix has all of a column's
    Fragment<T, 4> a[2];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t words[4];
      load_matrices(words, rows.at(lane % 16, c + 2 * step + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step].set(i, words[i]);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      uint32_t words[4];
      load_matrices(words, columns.at(8 * n + lane % 8, c + lane / 8));
      float part[4] = {};
      float (&sum)[4] = is_fp32<T> ? part : products[n];
      static_assert(fp32_steps == 2, "a part is what one ldmatrix has");
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Fragment<T, 2> b;
        b.set(0, words[2 * step]);
        b.set(1, words[2 * step + 1]);
        mma<T>(sum, a[step].big, b.big);
        add_corrections<T>(rest[n], a[step], b);
      }
#pragma unroll
      for (int i = 0; i < 4 && is_fp32<T>; ++i) products[n][i] += part[i];
    }
  }
  if constexpr (is_fp32<T>) {  // an infinite product has NaN as its correction
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = isinf(products[n][i]) ? products[n][i] : products[n][i] + rest[n][i];
  }
}

// sums += weights values, for the warp's 16 rows of weights and N rows of values. 16-bit types round the weights.
template <typename T, int D, int N>
__device__ __forceinline__ void multiply(float (&sums)[D / 8][4], const float (&weights)[N / 8][4], Tile<T, D> values) {
  const uint32_t lane = thread_anew<T>() % warp_size;
  if constexpr (is_fp32<T>) {
    // The order of the inner dimension is free as long as both sides have it: element t is taken to be 2t and 4 + t to be
    // 2t + 1, so that a C fragment is an A fragment. It also keeps rows apart that would share banks.
    const uint32_t g = lane / 4, t = lane % 4;
    constexpr int steps = N / 8 < fp32_steps ? N / 8 : fp32_steps;
#pragma unroll
    for (int first = 0; first < N / 8; first += steps) {
      Fragment<T, 4> a[steps];
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        a[k].set(0, __float_as_uint(weights[first + k][0]));
        a[k].set(1, __float_as_uint(weights[first + k][2]));
        a[k].set(2, __float_as_uint(weights[first + k][1]));
        a[k].set(3, __float_as_uint(weights[first + k][3]));
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        float part[4] = {};
        Fragment<T, 2> b[steps];
#pragma unroll
        for (int k = 0; k < steps; ++k) {
#pragma unroll
          for (int i = 0; i < 2; ++i) b[k].set(i, __float_as_uint(values.at(8 * (first + k) + 2 * t + i, 2 * n + g / 4)[g % 4]));
          add_corrections<T>(part, a[k], b[k]);
        }
#pragma unroll
        for (int k = 0; k < steps; ++k) mma<T>(part, a[k].big, b[k].big);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] += part[i];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      Fragment<T, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, pack<T>(weights[2 * k + i / 2][2 * (i % 2)], weights[2 * k + i / 2][2 * (i % 2) + 1]));
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t words[4];
        load_matrices_transposed(words, values.at(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Fragment<T, 2> b;
          b.set(0, words[2 * half]);
          b.set(1, words[2 * half + 1]);
          mma<T>(sums[2 * n + half], a.big, b.big);
        }
      }
    }
  }
}

// Stores the warp's 16 rows, row g times factors[0] and row g + 8 times factors[1], through `stage`, 16 rows of shared memory
// that nobody else uses, so that every thread writes 16 bytes and a row is written as one piece.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const HeadRows<T>& head, int64_t first, const float (&sums)[D / 8][4], const float (&factors)[2],
                                           Tile<T, D> stage) {
  const uint32_t lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = sums[n][2 * half] * factors[half], y = sums[n][2 * half + 1] * factors[half];
      const uint32_t row = g + 8 * half;
      if constexpr (is_fp32<T>) {  // odd rows the other way round: their neighbours have the other banks then
        T* const pair = stage.at(row, 2 * n + t / 2) + 2 * (t % 2);
        pair[g % 2] = g % 2 ? y : x;
        pair[1 - g % 2] = g % 2 ? x : y;
      } else {
        const uint32_t word = pack<T>(x, y);
        *reinterpret_cast<uint32_t*>(stage.at(row, n) + 2 * t) = word;
      }
    }
  __syncwarp();
  constexpr uint32_t chunks = Tile<T, D>::chunks;
#pragma unroll
  for (uint32_t i = lane; i < rows_of_warp * chunks; i += warp_size) {
    const uint32_t row = i / chunks, c = i % chunks;
    if (first + row < head.rows && c * Tile<T, D>::chunk < uint32_t(head.channels))
      *reinterpret_cast<uint4*>(head.data + (first + row) * head.stride + c * Tile<T, D>::chunk) =
          *reinterpret_cast<const uint4*>(stage.at(row, c));
  }
}

// 2^x; results below the normal numbers become zero, which no sum here would notice.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The block's share of the work: `rows` tokens of one head of one sample.
struct Share { int64_t sample, head, first; };
__device__ __forceinline__ Share share_of_block(int64_t tokens, int64_t heads, int rows) {
  const uint32_t shares = uint32_t((tokens + rows - 1) / rows), pair = blockIdx.x / shares;
  return {int64_t(pair / uint32_t(heads)), int64_t(pair % uint32_t(heads)), int64_t(blockIdx.x % shares) * rows};
}

// q (which = 0), k (1) or v (2) of one head, of qkv (samples, tokens, 3, heads, channels) or its gradient.
template <typename T>
__device__ __forceinline__ HeadRows<T> packed_rows(T* qkv, int which, const Share& share, int64_t tokens, int64_t heads, int channels) {
  const int64_t stride = 3 * heads * channels;
  return {qkv + share.sample * tokens * stride + (which * heads + share.head) * channels, stride, tokens, channels};
}

// One head of out (samples, tokens, heads, channels) or its gradient.
template <typename T>
__device__ __forceinline__ HeadRows<T> out_rows(T* out, const Share& share, int64_t tokens, int64_t heads, int channels) {
  const int64_t stride = heads * channels;
  return {out + share.sample * tokens * stride + share.head * channels, stride, tokens, channels};
}

constexpr int64_t blocks_for(int64_t samples, int64_t tokens, int64_t heads, int rows) {
  return samples * heads * ((tokens + rows - 1) / rows);
}

// Lets a kernel have more shared memory than the 48 KB that need no leave.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, uint32_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// Why these arguments cannot be launched, or null.
inline const char* why_not(const AttentionArguments& a, std::initializer_list<int64_t> blocks, std::initializer_list<const void*> tensors) {
  if (a.head_channels < 8 || a.head_channels > 256 || a.head_channels % 8 != 0) return "head_channels must be a multiple of 8, at most 256";
  for (const int64_t count : blocks)
    if (count > largest_grid_x) return "too many rows for one grid";
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % chunk_bytes != 0) return "a tensor does not start at a multiple of 16 bytes";
  return nullptr;
}

}  // namespace ddpm_fast::cuda
