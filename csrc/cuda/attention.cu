// attention, forward: softmax(q kᵀ scale) v of packed qkv (samples, tokens, 3, heads, channels), as a 1x1 convolution leaves it
// in channels_last, into out (samples, tokens, heads, channels), as the next one takes it. Online softmax in fp32 (Milakov &
// Gimelshein 2018; Dao et al. 2022): a block keeps 64 queries and goes over the keys, 16 queries a warp, and nothing of
// size tokens² is stored. 16-bit types use mma.sync with fp32 sums and round the weights to their type before they meet v;
// fp32 uses tf32 three times for each product, which has fp32's accuracy (mma.cuh).
// Reads qkv and writes out and logsumexp once; k and v are read again, from L2, for each further 64 queries.
//
// While a tile of keys is multiplied its values are on their way, and while these are the next keys: two buffers, one barrier
// for each product.
#include "attention_tile.cuh"

namespace ddpm_fast::cuda {
namespace {

constexpr int warps = 4;  // a block of 64 queries: two and more fit an SM, so that one multiplies while another takes exponentials
constexpr int threads_per_block = warps * warp_size;
constexpr int queries = warps * rows_of_warp;

// Blocks that an SM's registers must hold, or 0: left to itself ptxas spills in fp32 to fit more of the smallest.
constexpr int blocks_by_registers(int element_size, int D) { return element_size == 2 ? 0 : D <= 64 ? 3 : 2; }

// Keys of a tile: as many as leave registers for D sums a row, and shared memory for two blocks an SM of sm_80 (fp32 of D 256: one).
__host__ __device__ constexpr int keys_of_tile(int element_size, int D) {
  if (element_size == 2) return D == 256 ? 32 : 64;
  return D == 32 ? 64 : D == 256 ? 16 : 32;
}
constexpr uint32_t shared_bytes(int element_size, int D) {
  return uint32_t((queries + 2 * keys_of_tile(element_size, D)) * D * element_size);
}

template <typename T, int D>
__global__ void __launch_bounds__(threads_per_block, blocks_by_registers(sizeof(T), D)) attention_kernel(
    const T* __restrict__ qkv,       // (samples, tokens, 3, heads, channels)
    T* __restrict__ out,             // (samples, tokens, heads, channels)
    float* __restrict__ logsumexp,   // (samples, heads, tokens), nats, or null
    int64_t tokens, int64_t heads,
    int channels,                    // at most D
    float scale) {
  constexpr int keys = keys_of_tile(sizeof(T), D);
  extern __shared__ __align__(128) unsigned char shared[];
  const Tile<T, D> q_tile{reinterpret_cast<T*>(shared)}, k_tile = q_tile.from(queries), v_tile = k_tile.from(keys);
  const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4, warp_row = threadIdx.x / warp_size * rows_of_warp;
  const Share share = share_of_block(tokens, heads, queries);
  const HeadRows<const T> q = packed_rows(qkv, 0, share, tokens, heads, channels);
  const HeadRows<const T> k = packed_rows(qkv, 1, share, tokens, heads, channels);
  const HeadRows<const T> v = packed_rows(qkv, 2, share, tokens, heads, channels);
  // 16-bit types take logits in units of ln 2, which saves a multiplication a weight; fp32 would lose accuracy by it.
  constexpr float unit = is_fp32<T> ? log2_e : 1.0f;
  const float factor = is_fp32<T> ? scale : scale * log2_e;

  float sums[D / 8][4] = {};                    // of weights times values, relative to e^highest
  float highest[2] = {-INFINITY, -INFINITY};    // logit so far, of rows g and g + 8
  float total[2] = {};                          // of the weights, this thread's columns only

  load_tile<queries, threads_per_block>(q_tile, q, share.first);
  load_tile<keys, threads_per_block>(k_tile, k, 0);
  for (int64_t first = 0; first < tokens; first += keys) {
    wait_for_copies();
    __syncthreads();  // the keys are there, and the values of the tile before have been used
    load_tile<keys, threads_per_block>(v_tile, v, first);
    float weights[keys / 8][4];
    multiply_transposed<T, D, keys>(weights, q_tile.from(warp_row), k_tile);

    float top[2] = {highest[0], highest[1]};
    const bool whole = first + keys <= tokens;
#pragma unroll
    for (int n = 0; n < keys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[n][i] = __fmul_rn(weights[n][i], factor);  // rounded as backward rounds it
        if (!whole && first + 8 * n + 2 * t + i % 2 >= tokens) weights[n][i] = -INFINITY;
        top[i / 2] = fmaxf(top[i / 2], weights[n][i]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
      const float origin = top[half] == -INFINITY ? 0.0f : top[half];  // -inf - -inf would be NaN
      const float shrink = exp2_fast((highest[half] - origin) * unit);
      highest[half] = top[half];
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums[n][2 * half] *= shrink;
        sums[n][2 * half + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          weights[n][i] = exp2_fast((weights[n][i] - origin) * unit);
          total[half] += weights[n][i];
        }
    }

    wait_for_copies();
    __syncthreads();  // the values are there, and the keys have been used
    if (first + keys < tokens) load_tile<keys, threads_per_block>(k_tile, k, first + keys);
    multiply<T, D, keys>(sums, weights, v_tile);
  }

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    inverse[half] = 1.0f / total[half];
    const int64_t token = share.first + warp_row + g + 8 * half;
    if (logsumexp && t == 0 && token < tokens)
      logsumexp[(share.sample * heads + share.head) * tokens + token] = highest[half] * (is_fp32<T> ? 1.0f : ln_2) + logf(total[half]);
  }
  store_rows(out_rows(out, share, tokens, heads, channels), share.first + warp_row, sums, inverse, q_tile.from(warp_row));
}

template <typename T, int D>
cudaError_t launch(const AttentionArguments& a, const AttentionLaunch& plan, cudaStream_t stream) {
  const cudaError_t error = allow_shared(attention_kernel<T, D>, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  attention_kernel<T, D><<<uint32_t(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(
      static_cast<const T*>(a.qkv.data), static_cast<T*>(a.out.data), a.logsumexp, a.tokens, a.heads, int(a.head_channels), a.scale);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const AttentionArguments& a, const AttentionLaunch& plan, cudaStream_t stream) {
  switch (plan.padded_channels) {
    case 32: return launch<T, 32>(a, plan, stream);
    case 64: return launch<T, 64>(a, plan, stream);
    case 128: return launch<T, 128>(a, plan, stream);
    default: return launch<T, 256>(a, plan, stream);
  }
}

}  // namespace

AttentionLaunch attention_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, DType dtype) {
  const int D = pad_channels(head_channels);
  return {"attention_kernel",
          D,
          0,
          blocks_for(samples, tokens, heads, queries),
          threads_per_block,
          shared_bytes(dtype == DType::float32 ? 4 : 2, D)};
}

const char* attention(const AttentionArguments& a, int device, void* stream) {
  if (a.samples == 0 || a.tokens == 0 || a.heads == 0) return nullptr;
  const AttentionLaunch plan = attention_plan(a.samples, a.tokens, a.heads, a.head_channels, a.qkv.dtype);
  if (const char* refusal = why_not(a, {plan.blocks}, {a.qkv.data, a.out.data})) return refusal;
  return launch_on(device, [&] {
    return launch_for(a.qkv.dtype, [&](auto t) { return launch<decltype(t)>(a, plan, static_cast<cudaStream_t>(stream)); });
  });
}

}  // namespace ddpm_fast::cuda
