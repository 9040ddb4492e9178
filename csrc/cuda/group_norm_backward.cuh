// group_norm's backward kernels. With xh = (x + pre_bias - mean) rstd, z = A xh + B, A = weight (1 + scale), B = bias (1 + scale) + shift
// and dz = grad_y mask silu'(z), each channel of a sample has S1 = sum dz, S2 = sum dz xh, X = sum xh, each group D1 = sum A S1 and
// D2 = sum A S2 over its channels, and grad_x = rstd (A dz - (D1 + xh D2) / M) for the M elements of a group.
// Reads x and grad_y and writes grad_x once where a slab is a tile; else reads x and grad_y twice. No atomics: one order of sums.
#pragma once
#include "group_norm_tile.cuh"

namespace ddpm_fast::cuda {

// Tables in shared memory, one float for each channel of the tile: of z, then of grad_x = lead dz - constant - linear xh.
struct GroupNormBackwardTables {
  float *pre_bias, *centre, *rstd, *slope, *offset, *lead, *constant, *linear, *partial;

  __device__ __forceinline__ GroupNormBackwardTables(float* shared, int32_t channels)
      : pre_bias(shared), centre(shared + channels), rstd(shared + 2 * channels), slope(shared + 3 * channels),
        offset(shared + 4 * channels), lead(shared + 5 * channels), constant(shared + 6 * channels), linear(shared + 7 * channels),
        partial(shared + 8 * channels) {}
};

// The floats of a.workspace: two for each channel of each sample, then where slabs are cut two for each group, and three for each
// channel and position tile.
__device__ __forceinline__ float* group_norm_group_sums(const GroupNormArguments& a) { return a.workspace + 2 * a.samples * a.channels; }
__device__ __forceinline__ float* group_norm_tile_sums(const GroupNormArguments& a) {
  return group_norm_group_sums(a) + 2 * a.samples * a.groups;
}

// S1, S2, X of a channel of a sample.
struct GroupNormChannelSums { float upstream, product, normalised; };

__device__ __forceinline__ float group_norm_factor(const GroupNormArguments& a, int64_t sample, int64_t channel) {
  return 1.0f + read(a.scale.view, sample * a.scale.stride + channel, 0.0f);
}

__device__ __forceinline__ float group_norm_slope(const GroupNormArguments& a, int64_t sample, int64_t channel) {
  return group_norm_factor(a, sample, channel) * read(a.weight, channel, 1.0f);
}

// The gradients of what one channel of a sample has, and its share of grad_weight and grad_bias; constant = D1 / M, linear = D2 / M.
__device__ __forceinline__ void group_norm_write_rows(const GroupNormArguments& a, int64_t sample, int64_t channel, float rstd,
                                                      const GroupNormChannelSums& sums, float constant, float linear) {
  const float factor = group_norm_factor(a, sample, channel), weight = read(a.weight, channel, 1.0f), bias = read(a.bias, channel, 0.0f);
  write(a.grad_shift.view, sample * a.grad_shift.stride + channel, sums.upstream);
  write(a.grad_scale.view, sample * a.grad_scale.stride + channel, weight * sums.product + bias * sums.upstream);
  write(a.grad_pre_bias.view, sample * a.grad_pre_bias.stride + channel,
        rstd * (factor * weight * sums.upstream - (float(a.pixels) * constant + sums.normalised * linear)));
  float* const share = a.workspace + 2 * (sample * a.channels + channel);
  share[0] = factor * sums.product;
  share[1] = factor * sums.upstream;
}

template <typename T, bool channels_last, int vector, int items>
__global__ void __launch_bounds__(group_norm_backward_most_threads, vector > 1 && items == group_norm_many_items ? 1 : 2)
group_norm_backward_kernel(const GroupNormArguments a, const GroupNormTile tile) {
  extern __shared__ __align__(16) float shared[];
  using Item = Pack<T, vector>;
  constexpr int unit = Item::unit, own = channels_last ? unit : 1;  // channels that a thread is at work on at one time
  const GroupNormPlace place = group_norm_place<channels_last, vector>(a, tile);
  if (place.sample >= a.samples) return;
  const GroupNormThread<channels_last, vector> thread(a, place);
  const GroupNormBackwardTables table(shared, tile.channels);

  Item x[items], grad[items];
  const T* from_x = static_cast<const T*>(a.x.data) + thread.offset;
  const T* from_grad = static_cast<const T*>(a.grad_y.data) + thread.offset;
#pragma unroll
  for (int k = 0; k < items; ++k, from_x += thread.stride, from_grad += thread.stride)
    if (k < thread.items) {
      x[k].load(from_x);
      grad[k].load(from_grad);
    }

  const float elements_of_group = float(place.group_channels) * float(a.pixels);
#pragma unroll 1
  for (int32_t c = thread_of_block(); c < place.channels; c += threads_of_block()) {
    const int64_t channel = place.channel + c, group = place.sample * a.groups + channel / place.group_channels;
    const float rstd = a.rstd[group], slope = group_norm_slope(a, place.sample, channel);
    table.pre_bias[c] = read(a.pre_bias.view, place.sample * a.pre_bias.stride + channel, 0.0f);
    table.centre[c] = a.mean[group];
    table.rstd[c] = rstd;
    table.slope[c] = slope;
    table.offset[c] = group_norm_factor(a, place.sample, channel) * read(a.bias, channel, 0.0f) +
                      read(a.shift.view, place.sample * a.shift.stride + channel, 0.0f);
    if (tile.phase == GroupNormPhase::results) {
      const float* const sums = group_norm_group_sums(a) + 2 * group;
      table.lead[c] = rstd * slope;
      table.constant[c] = rstd * sums[0];
      table.linear[c] = rstd * sums[1];
    }
  }
  __syncthreads();

  if (a.dropout.threshold) {  // what was dropped has no gradient; the scale of the rest is applied in fp32, below
    uint64_t keep = 0;
#pragma unroll
    for (int k = 0; k < items; ++k) {
      if (k % group_norm_masked<vector> == 0) keep = group_norm_mask<vector, channels_last>(a, place, thread, k);
      if (k >= thread.items) continue;
#pragma unroll
      for (int u = 0; u < vector / unit; ++u) {
        float values[unit];
        grad[k].get(u, values);
#pragma unroll
        for (int j = 0; j < unit; ++j) values[j] = keep >> (k * vector + u * unit + j) % 64 & 1 ? values[j] : 0.0f;
        grad[k].set(u, values);
      }
    }
  }
  const float kept_scale = a.dropout.scale;

  // Calls use(channel of the unit, xh, dz) for the elements of unit u of all items, and done(item, what use gave) for each item. What
  // belongs to the unit's channels is read once for all items.
  const auto each = [&](int u, auto use, auto done) {
    float pre_bias[own], centre[own], rstd[own], slope[own], offset[own];
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int32_t c = thread.entry(u * unit + j);
      pre_bias[j] = table.pre_bias[c], centre[j] = table.centre[c], rstd[j] = table.rstd[c];
      slope[j] = table.slope[c], offset[j] = table.offset[c];
    }
#pragma unroll
    for (int k = 0; k < items; ++k) {
      if (k < thread.items) {
        float values[unit], dz[unit];
        x[k].get(u, values);
        grad[k].get(u, dz);
#pragma unroll
        for (int j = 0; j < unit; ++j) {
          const int c = channels_last ? j : 0;
          const float xh = (values[j] + pre_bias[c] - centre[c]) * rstd[c];
          dz[j] *= kept_scale;
          if (a.silu) {
            const float z = xh * slope[c] + offset[c];
            dz[j] *= silu_slope(z, fast_sigmoid(z));
          }
          dz[j] = use(c, xh, dz[j]);
        }
        done(k, dz);
      }
    }
  };

  if (tile.phase != GroupNormPhase::results) {
    float sums[3][own] = {};
#pragma unroll
    for (int u = 0; u < vector / unit; ++u) {
      each(
          u,
          [&](int c, float xh, float dz) {
            sums[0][c] += dz;
            sums[1][c] += dz * xh;
            sums[2][c] += xh;
            return dz;
          },
          [](int, const float (&)[unit]) {});
      if constexpr (channels_last) {
        group_norm_collect<true>(sums, threadIdx.x * vector + u * unit, tile.channels, tile.slots, table.partial);
#pragma unroll
        for (int v = 0; v < 3; ++v)
#pragma unroll
          for (int j = 0; j < own; ++j) sums[v][j] = 0.0f;
      }
    }
    if constexpr (!channels_last) group_norm_collect<false>(sums, threadIdx.y, tile.channels, tile.slots, table.partial);
    __syncthreads();

    const int32_t stride = tile.slots * tile.channels;  // from one sum to the next; a channel's own thread puts its total in slot 0
#pragma unroll 1
    for (int32_t c = thread_of_block(); c < place.channels; c += threads_of_block()) {
      float total[3] = {};
#pragma unroll 1
      for (int32_t slot = 0; slot < tile.slots; ++slot)
#pragma unroll
        for (int v = 0; v < 3; ++v) total[v] += table.partial[v * stride + slot * tile.channels + c];
      if (tile.phase == GroupNormPhase::whole) {
#pragma unroll
        for (int v = 0; v < 3; ++v) table.partial[v * stride + c] = total[v];
      } else {
        const int64_t row = (place.sample * tile.position_tiles + place.position_part) * a.channels + place.channel + c;
        reinterpret_cast<GroupNormChannelSums*>(group_norm_tile_sums(a))[row] = {total[0], total[1], total[2]};
      }
    }
    if (tile.phase == GroupNormPhase::sums) return;
    __syncthreads();

    group_norm_each_group(tile, place, [&](int64_t, int32_t low, int32_t high) {
      float constant = 0.0f, linear = 0.0f;
#pragma unroll 1
      for (int32_t c = low + thread_of_block() % 32; c < high; c += 32) {
        constant += table.slope[c] * table.partial[c];
        linear += table.slope[c] * table.partial[stride + c];
      }
      constant = sum_over_warp(constant) / elements_of_group;
      linear = sum_over_warp(linear) / elements_of_group;
#pragma unroll 1
      for (int32_t c = low + thread_of_block() % 32; c < high; c += 32) {
        table.lead[c] = table.rstd[c] * table.slope[c];
        table.constant[c] = table.rstd[c] * constant;
        table.linear[c] = table.rstd[c] * linear;
        group_norm_write_rows(a, place.sample, place.channel + c, table.rstd[c],
                              {table.partial[c], table.partial[stride + c], table.partial[2 * stride + c]}, constant, linear);
      }
    });
    __syncthreads();
  }

  if (!a.grad_x.data) return;
#pragma unroll
  for (int u = 0; u < vector / unit; ++u) {
    float lead[own], constant[own], linear[own];
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int32_t c = thread.entry(u * unit + j);
      lead[j] = table.lead[c], constant[j] = table.constant[c], linear[j] = table.linear[c];
    }
    each(
        u, [&](int c, float xh, float dz) { return lead[c] * dz - (constant[c] + linear[c] * xh); },
        [&](int k, const float (&values)[unit]) { x[k].set(u, values); });
  }
  T* to = static_cast<T*>(a.grad_x.data) + thread.offset;
#pragma unroll
  for (int k = 0; k < items; ++k, to += thread.stride)
    if (k < thread.items) x[k].store(to);
}

// Where slabs are cut: adds up the tiles of one group of a sample, blockIdx (group, sample, samples beyond the limit of y).
__global__ void __launch_bounds__(group_norm_finish_threads) group_norm_backward_finish_kernel(const GroupNormArguments a,
                                                                                               const GroupNormTile tile) {
  __shared__ float partial[2][group_norm_finish_threads / 32];
  const int64_t sample = int64_t(blockIdx.z) * gridDim.y + blockIdx.y, group = sample * a.groups + blockIdx.x;
  if (sample >= a.samples) return;
  const int32_t group_channels = int32_t(a.channels / a.groups), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * group_channels;
  auto* const sums = reinterpret_cast<GroupNormChannelSums*>(group_norm_tile_sums(a)) + sample * tile.position_tiles * a.channels;
  float constant = 0.0f, linear = 0.0f;
#pragma unroll 1
  for (int32_t c = warp; c < group_channels; c += group_norm_finish_threads / 32) {  // a warp a channel; its sums stay in tile 0
    float upstream = 0.0f, product = 0.0f, normalised = 0.0f;
    for (int32_t part = lane; part < tile.position_tiles; part += 32) {
      const GroupNormChannelSums& at = sums[part * a.channels + first + c];
      upstream += at.upstream, product += at.product, normalised += at.normalised;
    }
    upstream = sum_over_warp(upstream), product = sum_over_warp(product), normalised = sum_over_warp(normalised);
    const float slope = group_norm_slope(a, sample, first + c);
    constant += slope * upstream;
    linear += slope * product;
    if (lane == 0) sums[first + c] = {upstream, product, normalised};
  }
  if (lane == 0) partial[0][warp] = constant, partial[1][warp] = linear;
  __syncthreads();
  const float elements = float(group_channels) * float(a.pixels), rstd = a.rstd[group];
  constant = linear = 0.0f;
#pragma unroll
  for (int w = 0; w < group_norm_finish_threads / 32; ++w) constant += partial[0][w], linear += partial[1][w];
  constant /= elements;
  linear /= elements;
  if (threadIdx.x == 0) {
    float* const to = group_norm_group_sums(a) + 2 * group;
    to[0] = constant;
    to[1] = linear;
  }
#pragma unroll 1
  for (int32_t c = threadIdx.x; c < group_channels; c += group_norm_finish_threads)
    group_norm_write_rows(a, sample, first + c, rstd, sums[first + c], constant, linear);
}

// grad_weight and grad_bias: sums of the samples' shares, block (channels, slices of the batch), in one order whatever runs first.
__global__ void __launch_bounds__(group_norm_parameters_threads) group_norm_backward_parameters_kernel(const GroupNormArguments a) {
  __shared__ float partial[2][group_norm_rows][group_norm_columns];
  const int64_t channel = int64_t(blockIdx.x) * group_norm_columns + threadIdx.x;
  float weight = 0.0f, bias = 0.0f;
  if (channel < a.channels) {
    for (int64_t sample = threadIdx.y; sample < a.samples; sample += group_norm_rows) {
      const float2 share = reinterpret_cast<const float2*>(a.workspace)[sample * a.channels + channel];
      weight += share.x;
      bias += share.y;
    }
  }
  partial[0][threadIdx.y][threadIdx.x] = weight;
  partial[1][threadIdx.y][threadIdx.x] = bias;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= a.channels) return;
  for (int row = 1; row < group_norm_rows; ++row) weight += partial[0][row][threadIdx.x], bias += partial[1][row][threadIdx.x];
  write(a.grad_weight, channel, weight);
  write(a.grad_bias, channel, bias);
}

}  // namespace ddpm_fast::cuda
