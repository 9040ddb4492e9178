// attention, backward. With P = softmax(q kᵀ scale) and δ = rowsum(grad_out out):
//   grad_v = Pᵀ grad_out,   dS = P (grad_out vᵀ - δ),   grad_q = scale dS k,   grad_k = scale dSᵀ q
// P is computed again from logsumexp, which forward saved. One kernel gives δ, one keeps a block of keys and goes over the
// queries for grad_k and grad_v, one keeps a block of queries and goes over the keys for grad_q: every value is summed by one
// thread in one order, so that results are the same from run to run. Two products more than with atomics is the price.
// Head sizes of 256 take grad_k and grad_v in two launches, for want of registers.
// logsumexp is rounded to fp32, so that P has a relative error of up to half an ulp of it: of consequence for fp32 where logits
// are in the hundreds.
// Reads qkv, out, grad_out and logsumexp and writes grad_qkv once, and δ; what a block goes over is read again from L2.
//
// The two tiles that a block goes over are copied while those before are multiplied: two buffers of a pair, one barrier a pair.
#include "attention_tile.cuh"

namespace ddpm_fast::cuda {
namespace {

constexpr int delta_threads = 256;   // a whole number of blocks fills an SM of any architecture
constexpr int lanes_of_row = 8;      // 128 bytes of a row at a time: the length of a cache line

constexpr int blocks_by_registers = 2;  // left to itself ptxas spills to fit four of the smallest

// What a block keeps and what it goes over at a time: as much as 99 KB hold (sm_86), and registers.
struct BackwardTile { int rows, columns; };
__host__ __device__ constexpr BackwardTile backward_tile(int element_size, int D) {
  if (element_size == 2) return {64, D <= 64 ? 64 : D == 128 ? 32 : 16};
  return D <= 64 ? BackwardTile{64, 32} : D == 128 ? BackwardTile{64, 16} : BackwardTile{32, 8};
}
__host__ __device__ constexpr int backward_threads(int element_size, int D) {
  return backward_tile(element_size, D).rows / rows_of_warp * warp_size;
}
constexpr uint32_t backward_tile_bytes(int element_size, int D) {
  const BackwardTile tile = backward_tile(element_size, D);
  return uint32_t((2 * tile.rows + 4 * tile.columns) * D * element_size);
}

template <typename T>
__global__ void __launch_bounds__(delta_threads) attention_delta_kernel(
    const T* __restrict__ out,       // (samples, tokens, heads, channels)
    const T* __restrict__ grad_out,  // (samples, tokens, heads, channels)
    float* __restrict__ delta,       // (samples, heads, tokens)
    int64_t rows,                    // samples * tokens * heads
    int64_t tokens, int64_t heads, int channels) {
  constexpr int chunk = chunk_bytes / sizeof(T);
  const int64_t row = (int64_t(blockIdx.x) * delta_threads + threadIdx.x) / lanes_of_row;
  float sum = 0;
  for (int c = threadIdx.x % lanes_of_row * chunk; row < rows && c < channels; c += lanes_of_row * chunk) {
    alignas(chunk_bytes) T x[chunk], y[chunk];
    *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(out + row * channels + c);
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(grad_out + row * channels + c);
#pragma unroll
    for (int i = 0; i < chunk; ++i) sum += float(x[i]) * float(y[i]);
  }
#pragma unroll
  for (int lanes = 1; lanes < lanes_of_row; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (row >= rows || threadIdx.x % lanes_of_row != 0) return;
  const int64_t head = row % heads, token = row / heads % tokens, sample = row / heads / tokens;
  delta[(sample * heads + head) * tokens + token] = sum;
}

// P. The logit is rounded as in forward before the difference is taken: what it lost is in logsumexp too.
__device__ __forceinline__ float weight_of(float product, float scale, float logsumexp) {
  return exp2_fast((__fmul_rn(product, scale) - logsumexp) * log2_e);
}

// Rows of the products are keys and columns are queries: Sᵀ = k qᵀ. Queries that do not exist are zero, like their δ and
// logsumexp, and add nothing; keys that do not exist have rows of their own, which are not stored.
template <typename T, int D, int gradient>
__global__ void __launch_bounds__(backward_threads(sizeof(T), D), blocks_by_registers) attention_backward_keys_kernel(
    const T* __restrict__ qkv,            // (samples, tokens, 3, heads, channels)
    const T* __restrict__ grad_out,       // (samples, tokens, heads, channels)
    const float* __restrict__ logsumexp,  // (samples, heads, tokens)
    const float* __restrict__ delta,      // (samples, heads, tokens)
    T* __restrict__ grad_qkv,             // (samples, tokens, 3, heads, channels)
    int64_t tokens, int64_t heads,
    int channels,                         // at most D
    float scale) {
  constexpr BackwardTile size = backward_tile(sizeof(T), D);
  constexpr int keys = size.rows, queries = size.columns, threads = backward_threads(sizeof(T), D);
  constexpr bool with_keys = gradient & grad_keys, with_values = gradient & grad_values;
  extern __shared__ __align__(128) unsigned char shared[];
  const Tile<T, D> k_tile{reinterpret_cast<T*>(shared)}, v_tile = k_tile.from(keys), buffers = v_tile.from(keys);
  float* const numbers = reinterpret_cast<float*>(buffers.from(4 * queries).data);  // logsumexp and δ of the queries, twice
  const uint32_t t = threadIdx.x % 4, warp_row = threadIdx.x / warp_size * rows_of_warp;
  const Share share = share_of_block(tokens, heads, keys);
  const HeadRows<const T> q = packed_rows(qkv, 0, share, tokens, heads, channels);
  const HeadRows<const T> grad = out_rows(grad_out, share, tokens, heads, channels);
  const int64_t first_number = (share.sample * heads + share.head) * tokens;

  const auto load_queries = [&](int64_t first, int buffer) {
    load_tile<queries, threads>(buffers.from(2 * buffer * queries), q, first);
    load_tile<queries, threads>(buffers.from((2 * buffer + 1) * queries), grad, first);
    static_assert(2 * queries <= threads, "a thread copies one number");
    if (const uint32_t i = thread_anew<T>(); i < 2 * queries) {
      const int64_t token = first + i % queries;
      const float* const from = (i < queries ? logsumexp : delta) + first_number;
      copy_async_4(numbers + 2 * buffer * queries + i, token < tokens ? from + token : from, token < tokens);
    }
  };

  float grad_k[with_keys ? D / 8 : 1][4] = {}, grad_v[with_values ? D / 8 : 1][4] = {};
  load_tile<keys, threads>(k_tile, packed_rows(qkv, 1, share, tokens, heads, channels), share.first);
  if constexpr (with_keys) load_tile<keys, threads>(v_tile, packed_rows(qkv, 2, share, tokens, heads, channels), share.first);
  load_queries(0, 0);
  int buffer = 0;
  for (int64_t first = 0; first < tokens; first += queries, buffer ^= 1) {
    wait_for_copies();
    __syncthreads();  // this pair is there, and the one before has been used
    if (first + queries < tokens) load_queries(first + queries, buffer ^ 1);
    const Tile<T, D> q_tile = buffers.from(2 * buffer * queries), grad_tile = q_tile.from(queries);
    const float* const numbers_of_tile = numbers + 2 * buffer * queries;

    float weights[queries / 8][4];
    multiply_transposed<T, D, queries>(weights, k_tile.from(warp_row), q_tile);
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = weight_of(weights[n][i], scale, numbers_of_tile[8 * n + 2 * t + i % 2]);
    if constexpr (with_values) multiply<T, D, queries>(grad_v, weights, grad_tile);
    __syncwarp();  // ptxas would mix this product and the next one, and spill
    if constexpr (with_keys) {
      float grad_logits[queries / 8][4];
      multiply_transposed<T, D, queries>(grad_logits, v_tile.from(warp_row), grad_tile);
#pragma unroll
      for (int n = 0; n < queries / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          grad_logits[n][i] = weights[n][i] * (grad_logits[n][i] - numbers_of_tile[queries + 8 * n + 2 * t + i % 2]);
      multiply<T, D, queries>(grad_k, grad_logits, q_tile);
    }
  }
  const Tile<T, D> stage = k_tile.from(warp_row);  // no other warp reads these keys
  if constexpr (with_keys)
    store_rows(packed_rows(grad_qkv, 1, share, tokens, heads, channels), share.first + warp_row, grad_k, {scale, scale}, stage);
  if constexpr (with_values)
    store_rows(packed_rows(grad_qkv, 2, share, tokens, heads, channels), share.first + warp_row, grad_v, {1.0f, 1.0f}, stage);
}

// Rows of the products are queries and columns are keys, as in forward.
template <typename T, int D>
__global__ void __launch_bounds__(backward_threads(sizeof(T), D), blocks_by_registers) attention_backward_queries_kernel(
    const T* __restrict__ qkv,            // (samples, tokens, 3, heads, channels)
    const T* __restrict__ grad_out,       // (samples, tokens, heads, channels)
    const float* __restrict__ logsumexp,  // (samples, heads, tokens)
    const float* __restrict__ delta,      // (samples, heads, tokens)
    T* __restrict__ grad_qkv,             // (samples, tokens, 3, heads, channels)
    int64_t tokens, int64_t heads,
    int channels,                         // at most D
    float scale) {
  constexpr BackwardTile size = backward_tile(sizeof(T), D);
  constexpr int queries = size.rows, keys = size.columns, threads = backward_threads(sizeof(T), D);
  extern __shared__ __align__(128) unsigned char shared[];
  const Tile<T, D> q_tile{reinterpret_cast<T*>(shared)}, grad_tile = q_tile.from(queries), buffers = grad_tile.from(queries);
  const uint32_t lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4, warp_row = threadIdx.x / warp_size * rows_of_warp;
  const Share share = share_of_block(tokens, heads, queries);
  const HeadRows<const T> k = packed_rows(qkv, 1, share, tokens, heads, channels);
  const HeadRows<const T> v = packed_rows(qkv, 2, share, tokens, heads, channels);

  float row_logsumexp[2] = {}, row_delta[2] = {};  // of rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = share.first + warp_row + g + 8 * half, i = (share.sample * heads + share.head) * tokens + token;
    if (token < tokens) row_logsumexp[half] = logsumexp[i];
    if (token < tokens) row_delta[half] = delta[i];
  }

  float grad_q[D / 8][4] = {};
  load_tile<queries, threads>(q_tile, packed_rows(qkv, 0, share, tokens, heads, channels), share.first);
  load_tile<queries, threads>(grad_tile, out_rows(grad_out, share, tokens, heads, channels), share.first);
  load_tile<keys, threads>(buffers, k, 0);
  load_tile<keys, threads>(buffers.from(keys), v, 0);
  int buffer = 0;
  for (int64_t first = 0; first < tokens; first += keys, buffer ^= 1) {
    wait_for_copies();
    __syncthreads();  // this pair is there, and the one before has been used
    if (first + keys < tokens) {
      load_tile<keys, threads>(buffers.from(2 * (buffer ^ 1) * keys), k, first + keys);
      load_tile<keys, threads>(buffers.from((2 * (buffer ^ 1) + 1) * keys), v, first + keys);
    }
    const Tile<T, D> k_tile = buffers.from(2 * buffer * keys), v_tile = k_tile.from(keys);

    float weights[keys / 8][4], grad_logits[keys / 8][4];
    multiply_transposed<T, D, keys>(weights, q_tile.from(warp_row), k_tile);
    multiply_transposed<T, D, keys>(grad_logits, grad_tile.from(warp_row), v_tile);
    const bool whole = first + keys <= tokens;
#pragma unroll
    for (int n = 0; n < keys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = weight_of(weights[n][i], scale, row_logsumexp[i / 2]);
        grad_logits[n][i] = weight * (grad_logits[n][i] - row_delta[i / 2]);
        // A key that does not exist has the logit 0, which may be far above the others.
        if (!whole && first + 8 * n + 2 * t + i % 2 >= tokens) grad_logits[n][i] = 0;
      }
    multiply<T, D, keys>(grad_q, grad_logits, k_tile);
  }
  store_rows(packed_rows(grad_qkv, 0, share, tokens, heads, channels), share.first + warp_row, grad_q, {scale, scale},
             q_tile.from(warp_row));
}

template <typename T>
cudaError_t launch_delta(const AttentionArguments& a, const AttentionLaunch& plan, cudaStream_t stream) {
  attention_delta_kernel<T><<<uint32_t(plan.blocks), plan.threads, 0, stream>>>(
      static_cast<const T*>(a.out.data), static_cast<const T*>(a.grad_out.data), a.workspace, a.samples * a.tokens * a.heads, a.tokens,
      a.heads, int(a.head_channels));
  return cudaGetLastError();
}

template <typename T>
using BackwardKernel = void(const T*, const T*, const float*, const float*, T*, int64_t, int64_t, int, float);

template <typename T>
cudaError_t launch(BackwardKernel<T>* kernel, const AttentionArguments& a, const AttentionLaunch& plan, cudaStream_t stream) {
  const cudaError_t error = allow_shared(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<uint32_t(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(
      static_cast<const T*>(a.qkv.data), static_cast<const T*>(a.grad_out.data), a.logsumexp, a.workspace, static_cast<T*>(a.grad_qkv.data),
      a.tokens, a.heads, int(a.head_channels), a.scale);
  return cudaGetLastError();
}

// The kernel that a launch of the plan after the first names.
template <typename T>
BackwardKernel<T>* kernel_of(const AttentionLaunch& plan) {
  constexpr int both = grad_keys | grad_values;
  switch (plan.padded_channels) {
    case 32: return plan.gradient ? attention_backward_keys_kernel<T, 32, both> : attention_backward_queries_kernel<T, 32>;
    case 64: return plan.gradient ? attention_backward_keys_kernel<T, 64, both> : attention_backward_queries_kernel<T, 64>;
    case 128: return plan.gradient ? attention_backward_keys_kernel<T, 128, both> : attention_backward_queries_kernel<T, 128>;
    default:
      return plan.gradient == grad_keys     ? attention_backward_keys_kernel<T, 256, grad_keys>
             : plan.gradient == grad_values ? attention_backward_keys_kernel<T, 256, grad_values>
                                            : attention_backward_queries_kernel<T, 256>;
  }
}

template <typename T>
cudaError_t launch(const AttentionArguments& a, const AttentionBackwardPlan& plan, cudaStream_t stream) {
  cudaError_t error = launch_delta<T>(a, plan.launches[0], stream);
  for (int i = 1; i < plan.count && error == cudaSuccess; ++i) error = launch(kernel_of<T>(plan.launches[i]), a, plan.launches[i], stream);
  return error;
}

}  // namespace

AttentionBackwardPlan attention_backward_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, DType dtype) {
  const int D = pad_channels(head_channels), element_size = dtype == DType::float32 ? 4 : 2;
  const BackwardTile tile = backward_tile(element_size, D);
  const uint32_t threads = uint32_t(backward_threads(element_size, D)), bytes = backward_tile_bytes(element_size, D);
  const uint32_t number_bytes = uint32_t(4 * tile.columns) * sizeof(float);
  const int64_t rows = samples * tokens * heads, blocks = blocks_for(samples, tokens, heads, tile.rows);
  constexpr int rows_of_block = delta_threads / lanes_of_row;

  AttentionBackwardPlan plan{};
  plan.workspace = rows;
  const auto add = [&plan](const AttentionLaunch& launch) { plan.launches[size_t(plan.count++)] = launch; };
  add({"attention_delta_kernel", 0, 0, (rows + rows_of_block - 1) / rows_of_block, delta_threads, 0});
  if (D == 256) {
    add({"attention_backward_keys_kernel", D, grad_values, blocks, threads, bytes + number_bytes});
    add({"attention_backward_keys_kernel", D, grad_keys, blocks, threads, bytes + number_bytes});
  } else {
    add({"attention_backward_keys_kernel", D, grad_keys | grad_values, blocks, threads, bytes + number_bytes});
  }
  add({"attention_backward_queries_kernel", D, 0, blocks, threads, bytes});
  return plan;
}

const char* attention_backward(const AttentionArguments& a, int device, void* stream) {
  if (a.samples == 0 || a.tokens == 0 || a.heads == 0) return nullptr;
  const AttentionBackwardPlan plan = attention_backward_plan(a.samples, a.tokens, a.heads, a.head_channels, a.qkv.dtype);
  const char* const refusal =
      why_not(a, {plan.launches[0].blocks, plan.launches[1].blocks}, {a.qkv.data, a.out.data, a.grad_out.data, a.grad_qkv.data});
  if (refusal) return refusal;
  return launch_on(device, [&] {
    return launch_for(a.qkv.dtype, [&](auto t) { return launch<decltype(t)>(a, plan, static_cast<cudaStream_t>(stream)); });
  });
}

}  // namespace ddpm_fast::cuda
