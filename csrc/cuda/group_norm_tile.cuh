// The tile of a block: where it lies, its elements in registers, its dropout mask, and its sums.
#pragma once
#include "../common/group_norm_math.h"
#include "group_norm.h"
#include "reduce.cuh"
#include "storage.cuh"

namespace ddpm_fast::cuda {

// Where a block's tile lies: (sample, slab), channels [channel, channel + channels) of the sample, positions [position, end).
struct GroupNormPlace {
  int64_t sample;
  int64_t group;            // first group of the slab
  int64_t channel;
  int32_t channels;
  int32_t group_channels;   // of one group
  int32_t position, end;
  int32_t part;             // number of the tile in its slab
  int32_t position_part;    // among the tiles of its channels
};

template <bool channels_last, int vector>
__device__ __forceinline__ GroupNormPlace group_norm_place(const GroupNormArguments& a, const GroupNormTile& tile) {
  GroupNormPlace place;
  const int32_t slabs = int32_t(a.groups) / tile.groups;  // neighbouring blocks take neighbouring slabs: in channels_last they share lines
  place.part = int32_t(blockIdx.x) / slabs;
  const int32_t slab = int32_t(blockIdx.x) - place.part * slabs;
  const int32_t channel_tile = place.part / tile.position_tiles;
  place.position_part = place.part - channel_tile * tile.position_tiles;
  place.sample = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  place.group = int64_t(slab) * tile.groups;
  place.group_channels = int32_t(a.channels / a.groups);
  const int32_t first = channel_tile * tile.channels, of_slab = tile.groups * place.group_channels;
  place.channel = place.group * place.group_channels + first;
  place.channels = min(tile.channels, of_slab - first);
  const int64_t begin = int64_t(place.position_part) * tile.positions, all = channels_last ? a.pixels : a.pixels / vector;
  place.position = int32_t(begin);
  place.end = int32_t(min(begin + tile.positions, all));
  return place;
}

// A thread has one row of memory to walk along: in NCHW the vectors x, x + blockDim.x, ... of channel threadIdx.y, in channels_last
// the vector of channels threadIdx.x of the pixels y, y + blockDim.y, ...
template <bool channels_last, int vector> struct GroupNormThread {
  int32_t channel;  // first of its channels, counted from the tile's; 0 in a thread that has no items
  int32_t items;  // that it has
  int32_t first;  // position of its first item; the next ones are `step` further each
  int32_t step;
  int64_t offset;  // of its first item in the tensor
  int64_t stride;  // from one item to the next

  __device__ __forceinline__ GroupNormThread(const GroupNormArguments& a, const GroupNormPlace& place) {
    const int32_t own = channels_last ? threadIdx.x * vector : threadIdx.y;
    step = channels_last ? blockDim.y : blockDim.x;
    first = place.position + int32_t(channels_last ? threadIdx.y : threadIdx.x);
    const bool inside = own < place.channels && first < place.end;
    channel = inside ? own : 0;
    items = inside ? (place.end - first + step - 1) / step : 0;
    const int64_t c = place.channel + channel;
    offset = channels_last ? (place.sample * a.pixels + first) * a.channels + c
                           : (place.sample * a.channels + c) * a.pixels + int64_t(first) * vector;
    stride = channels_last ? step * a.channels : int64_t(step) * vector;
  }

  // Which entry of a per-channel table belongs to element e of an item.
  __device__ __forceinline__ int32_t entry(int e) const { return channels_last ? channel + e : channel; }
};

__device__ __forceinline__ int32_t thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int32_t threads_of_block() { return blockDim.x * blockDim.y; }

// sigmoid within a few ulp while |z| is small, 0 and 1 where it is large. Below 2^-126 it is 0.
__device__ __forceinline__ float fast_sigmoid(float z) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

// Items that share a word of 64 bits, and the words of all of a thread's.
template <int vector> constexpr int group_norm_masked = 64 / vector;
template <int vector, int items> constexpr int group_norm_mask_words = (items * vector + 63) / 64;

// Bit k * vector + e says that element e of item `first` + k is kept. One loop for them, so that the generator's code is there once.
template <int vector, bool channels_last>
__device__ __forceinline__ uint64_t group_norm_mask(const GroupNormArguments& a, const GroupNormPlace& place,
                                                    const GroupNormThread<channels_last, vector>& thread, int32_t first) {
  constexpr int words = channels_last && vector >= 4 ? 4 : 1;  // that one counter block gives: channels run fastest
  const uint32_t threshold = a.dropout.threshold;
  const uint64_t sample = a.dropout.key.first_sample + uint64_t(place.sample);
  const int32_t items = min(thread.items - first, group_norm_masked<vector>);
  uint64_t keep = 0;
#pragma unroll 1
  for (int32_t k = 0; k < items; ++k) {
    const int64_t position = thread.first + int64_t(first + k) * thread.step;
#pragma unroll 1
    for (int e = 0; e < vector; e += words) {
      const int64_t i = (channels_last ? position : position * vector + e) * a.channels + place.channel + thread.entry(e);
      uint32_t c0 = uint32_t(i / 4), c1 = a.dropout.key.stream, c2 = uint32_t(sample), c3 = uint32_t(sample >> 32);
      philox4x32_10(c0, c1, c2, c3, uint32_t(a.dropout.key.seed), uint32_t(a.dropout.key.seed >> 32));
      uint32_t bits;
      if (words == 4) {
        bits = uint32_t(c0 >= threshold) | uint32_t(c1 >= threshold) << 1 | uint32_t(c2 >= threshold) << 2 | uint32_t(c3 >= threshold) << 3;
      } else {
        const uint32_t word = i & 2 ? (i & 1 ? c3 : c2) : (i & 1 ? c1 : c0);
        bits = word >= threshold;
      }
      keep |= uint64_t(bits) << (k * vector + e);
    }
  }
  return keep;
}

// Calls use(k, u) for unit u of each item k that there is, and done(k) behind an item's last. start(u) comes before a unit's first: item
// by item all of them come at once, unit by unit what they read lives in few registers, for more tests of whether there is an item.
template <bool by_unit, int items, int units, typename Start, typename Use, typename Done>
__device__ __forceinline__ void group_norm_each_unit(int32_t present, Start start, Use use, Done done) {
  if constexpr (by_unit) {
#pragma unroll
    for (int u = 0; u < units; ++u) {
      start(u);
#pragma unroll
      for (int k = 0; k < items; ++k)
        if (k < present) use(k, u);
    }
#pragma unroll
    for (int k = 0; k < items; ++k)
      if (k < present) done(k);
  } else {
#pragma unroll
    for (int u = 0; u < units; ++u) start(u);
#pragma unroll
    for (int k = 0; k < items; ++k)
      if (k < present) {
#pragma unroll
        for (int u = 0; u < units; ++u) use(k, u);
        done(k);
      }
  }
}

// Adds up what the threads have: sums[v][j] for entry `entry` + j of `width` entries, a channel or neighbouring channels of one group
// each. Leaves the sum v of an entry in `slots` parts, at partial[(v * slots + slot) * width + entry]; to be read after a barrier.
template <bool channels_last, int values, int count>
__device__ __forceinline__ void group_norm_collect(float (&sums)[values][count], int32_t entry, int32_t width, int32_t slots,
                                                   float* partial) {
  const int32_t x = blockDim.x, warp = thread_of_block() / 32, lane = thread_of_block() % 32;
  const bool shuffled = !channels_last || (x < 32 && (x & (x - 1)) == 0);
  if (shuffled) sum_over_lanes(sums, channels_last ? x : 1, channels_last ? 32 : x);
  const int32_t slot = channels_last ? (shuffled ? warp : int32_t(threadIdx.y)) : int32_t(threadIdx.x) / 32;
  const bool writes = channels_last ? !shuffled || lane < x : int32_t(threadIdx.x) % 32 == 0;
  if (!writes || entry >= width) return;
#pragma unroll
  for (int v = 0; v < values; ++v) {
    float* const to = partial + (v * slots + slot) * width + entry;
    constexpr int together = count % 4 == 0 ? 4 : count;
#pragma unroll
    for (int j = 0; j < count; j += together) {
      if constexpr (together == 4) *reinterpret_cast<float4*>(to + j) = {sums[v][j], sums[v][j + 1], sums[v][j + 2], sums[v][j + 3]};
      else if constexpr (together == 2) *reinterpret_cast<float2*>(to + j) = {sums[v][j], sums[v][j + 1]};
      else to[j] = sums[v][j];
    }
  }
}

// The slab's groups that the tile has channels of, a warp each: calls use(group, first channel in the tile, one past the last).
template <typename Use>
__device__ __forceinline__ void group_norm_each_group(const GroupNormTile& tile, const GroupNormPlace& place, Use use) {
  const int32_t first = int32_t(place.channel - place.group * place.group_channels);
#pragma unroll 1
  for (int32_t g = thread_of_block() / 32; g < tile.groups; g += threads_of_block() / 32) {
    if (thread_of_block() >= threads_of_block() / 32 * 32) break;  // a warp that is not whole
    use(place.group + g, max(g * place.group_channels - first, 0), min((g + 1) * place.group_channels - first, place.channels));
  }
}

}  // namespace ddpm_fast::cuda
