// group_norm's forward kernel. Reads x and writes y once where a slab is a tile; else reads x twice, in two launches.
#pragma once
#include "group_norm_tile.cuh"

namespace ddpm_fast::cuda {

// Of a group's part in one tile, a.workspace[((n * groups + g) * tiles + tile) * 4]: elements, mean = origin + offset, sum of squared
// deviations from it. In one number the mean would be rounded by more than the tiles' means differ where |mean| is large.
struct __align__(16) GroupNormMoments { float count, origin, offset, squares; };

// Tables in shared memory, one float for each channel of the tile: y = silu((x + pre_bias - centre) * slope + offset).
struct GroupNormTables {
  float *pre_bias, *centre, *slope, *offset, *partial;

  __device__ __forceinline__ GroupNormTables(float* shared, int32_t channels)
      : pre_bias(shared), centre(shared + channels), slope(shared + 2 * channels), offset(shared + 3 * channels),
        partial(shared + 4 * channels) {}
};

__device__ __forceinline__ void group_norm_fill_tables(const GroupNormArguments& a, const GroupNormPlace& place,
                                                       const GroupNormTables& table) {
#pragma unroll 1
  for (int32_t c = thread_of_block(); c < place.channels; c += threads_of_block()) {
    const int64_t channel = place.channel + c;
    const float factor = 1.0f + read(a.scale.view, place.sample * a.scale.stride + channel, 0.0f);
    table.pre_bias[c] = read(a.pre_bias.view, place.sample * a.pre_bias.stride + channel, 0.0f);
    table.slope[c] = factor * read(a.weight, channel, 1.0f);
    table.offset[c] = factor * read(a.bias, channel, 0.0f) + read(a.shift.view, place.sample * a.shift.stride + channel, 0.0f);
  }
}

// Mean and rstd of a group as the last pass uses them.
__device__ __forceinline__ void group_norm_finish(const GroupNormArguments& a, const GroupNormPlace& place, const GroupNormTables& table,
                                                  int64_t group, int32_t low, int32_t high, float mean, float variance) {
  const float rstd = __frsqrt_rn((variance < 0.0f ? 0.0f : variance) + a.eps);  // written so that NaN stays NaN
#pragma unroll 1
  for (int32_t c = low + thread_of_block() % 32; c < high; c += 32) {
    table.centre[c] = mean;
    table.slope[c] *= rstd;
  }
  if (thread_of_block() % 32 == 0 && place.part == 0) {
    a.mean[place.sample * a.groups + group] = mean;
    a.rstd[place.sample * a.groups + group] = rstd;
  }
}

// Merges the moments of all tiles: the mean first, counted from one tile's origin so that nothing cancels, then the deviations from it.
__device__ __forceinline__ void group_norm_merge(const GroupNormArguments& a, const GroupNormTile& tile, const GroupNormPlace& place,
                                                 const GroupNormTables& table) {
  group_norm_each_group(tile, place, [&](int64_t group, int32_t low, int32_t high) {
    const int32_t tiles = tile.channel_tiles * tile.position_tiles;
    const GroupNormMoments* const moments = reinterpret_cast<GroupNormMoments*>(a.workspace) + (place.sample * a.groups + group) * tiles;
    const float origin = moments[tiles / 2].origin;
    float count = 0.0f, sum = 0.0f, squares = 0.0f;
#pragma unroll 1
    for (int32_t i = thread_of_block() % 32; i < tiles; i += 32) {
      const GroupNormMoments m = moments[i];
      count += m.count;
      sum += m.count * (m.origin - origin + m.offset);
    }
    count = sum_over_warp(count);
    const float offset = sum_over_warp(sum) / count;
#pragma unroll 1
    for (int32_t i = thread_of_block() % 32; i < tiles; i += 32) {
      const GroupNormMoments m = moments[i];
      const float d = m.origin - origin + m.offset - offset;
      squares += m.squares + m.count * d * d;
    }
    group_norm_finish(a, place, table, group, low, high, origin + offset, sum_over_warp(squares) / count);
  });
}

// Where sixteen vectors of eight channels leave no registers for what belongs to each of the eight.
template <bool channels_last, int vector, int items> constexpr bool group_norm_by_unit = channels_last && vector * items > 64;

// Sums over the threads of what they have for each of their channels. Where `joint` neighbouring channels, or all of a thread's, always
// are of one group, they are added up first: that many fewer shuffles.
template <bool channels_last, int joint, int values, int own>
__device__ __forceinline__ void group_norm_collect_jointly(const float (&sums)[values][own], const GroupNormTile& tile, float* partial) {
  float few[values][own / joint] = {};
#pragma unroll
  for (int v = 0; v < values; ++v)
#pragma unroll
    for (int j = 0; j < own; ++j) few[v][j / joint] += sums[v][j];
  const int32_t entry = channels_last ? threadIdx.x * (own / joint) : threadIdx.y;
  group_norm_collect<channels_last>(few, entry, tile.channels / joint, tile.slots, partial);
}

template <bool channels_last, int values, int own>
__device__ __forceinline__ void group_norm_collect_groups(const float (&sums)[values][own], int joint, const GroupNormTile& tile,
                                                          float* partial) {
  if (own >= 8 && joint == 8) group_norm_collect_jointly<channels_last, own >= 8 ? 8 : 1>(sums, tile, partial);
  else if (own >= 4 && joint == 4) group_norm_collect_jointly<channels_last, own >= 4 ? 4 : 1>(sums, tile, partial);
  else group_norm_collect_jointly<channels_last, 1>(sums, tile, partial);
}

// Sum v over the tile's channels [low, high), by one warp.
__device__ __forceinline__ float group_norm_total(const float* partial, int v, int joint, const GroupNormTile& tile, int32_t low,
                                                  int32_t high) {
  const int32_t width = tile.channels / joint, entries = (high - low) / joint;
  float total = 0.0f;
#pragma unroll 1
  for (int32_t i = thread_of_block() % 32; i < entries * tile.slots; i += 32) {
    const int32_t slot = i / entries;
    total += partial[(v * tile.slots + slot) * width + low / joint + i - slot * entries];
  }
  return sum_over_warp(total);
}

// Corrected two-pass moments (Chan, Golub, LeVeque 1983) of the tile in registers: the second pass adds up the deviations from the
// first one's mean too, which takes that mean's rounding out of both results. Fills the tables, or the workspace where the slab is cut.
template <int items, bool channels_last, int vector, typename Item>
__device__ __forceinline__ void group_norm_moments(const GroupNormArguments& a, const GroupNormTile& tile, const GroupNormPlace& place,
                                                   const GroupNormTables& table, const GroupNormThread<channels_last, vector>& thread,
                                                   const Item (&x)[items]) {
  constexpr int own = channels_last ? vector : 1, unit = Item::unit;
  constexpr bool by_unit = group_norm_by_unit<channels_last, vector, items>;
  const auto each = [&](auto start, auto use) {  // start(j) for a channel of the thread, use(j, x)
    group_norm_each_unit<by_unit, items, vector / unit>(
        thread.items,
        [&](int u) {
#pragma unroll
          for (int j = u * unit; j < (u + 1) * unit; ++j)
            if (j < own) start(j);
        },
        [&](int k, int u) {
          float values[unit];
          x[k].get(u, values);
#pragma unroll
          for (int j = 0; j < unit; ++j) use(channels_last ? u * unit + j : 0, values[j]);
        },
        [](int) {});
  };
  const int32_t pixels = (place.end - place.position) * (channels_last ? 1 : vector);
  const int joint = !channels_last ? 1 : place.group_channels % vector == 0 ? vector : vector > 4 && place.group_channels % 4 == 0 ? 4 : 1;
  float pre_bias[own], sum[1][own] = {};
  each([&](int j) { pre_bias[j] = table.pre_bias[thread.entry(j)]; }, [&](int j, float value) { sum[0][j] += value + pre_bias[j]; });
  group_norm_collect_groups<channels_last>(sum, joint, tile, table.partial);
  __syncthreads();
  group_norm_each_group(tile, place, [&](int64_t, int32_t low, int32_t high) {
    const float mean = group_norm_total(table.partial, 0, joint, tile, low, high) / (float(high - low) * float(pixels));
#pragma unroll 1
    for (int32_t c = low + thread_of_block() % 32; c < high; c += 32) table.centre[c] = mean;
  });
  __syncthreads();
  float centre[own], deviations[2][own] = {};
  each([&](int j) { pre_bias[j] = table.pre_bias[thread.entry(j)], centre[j] = table.centre[thread.entry(j)]; },
       [&](int j, float value) {
         const float d = value + pre_bias[j] - centre[j];
         deviations[0][j] += d;
         deviations[1][j] += d * d;
       });
  group_norm_collect_groups<channels_last>(deviations, joint, tile, table.partial);
  __syncthreads();
  group_norm_each_group(tile, place, [&](int64_t group, int32_t low, int32_t high) {
    const float count = high > low ? float(high - low) * float(pixels) : 0.0f, origin = high > low ? table.centre[low] : 0.0f;
    const float sum = group_norm_total(table.partial, 0, joint, tile, low, high);
    const float squares = group_norm_total(table.partial, 1, joint, tile, low, high);
    const float offset = count > 0.0f ? sum / count : 0.0f, corrected = squares - sum * offset;
    __syncwarp();  // all lanes have read the centre that is written next
    if (tile.phase == GroupNormPhase::whole) {
      group_norm_finish(a, place, table, group, low, high, origin + offset, corrected / count);
    } else if (thread_of_block() % 32 == 0) {
      const int64_t tiles = int64_t(tile.channel_tiles) * tile.position_tiles, row = (place.sample * a.groups + group) * tiles + place.part;
      reinterpret_cast<GroupNormMoments*>(a.workspace)[row] = {count, origin, offset, corrected};
    }
  });
}

template <typename T, bool channels_last, int vector, int items>
__global__ void __launch_bounds__(group_norm_most_threads, 1) group_norm_kernel(const GroupNormArguments a, const GroupNormTile tile) {
  extern __shared__ __align__(16) float shared[];
  using Item = Pack<T, vector>;
  constexpr int own = channels_last ? vector : 1, unit = Item::unit;  // channels of a thread, elements handled together
  const GroupNormPlace place = group_norm_place<channels_last, vector>(a, tile);
  if (place.sample >= a.samples) return;
  const GroupNormThread<channels_last, vector> thread(a, place);
  const GroupNormTables table(shared, tile.channels);

  Item x[items];
  const T* from = static_cast<const T*>(a.x.data) + thread.offset;
#pragma unroll
  for (int k = 0; k < items; ++k, from += thread.stride)
    if (k < thread.items) x[k].load(from);
  group_norm_fill_tables(a, place, table);
  __syncthreads();

  if (tile.phase == GroupNormPhase::results) {
    group_norm_merge(a, tile, place, table);
  } else {
    group_norm_moments<items>(a, tile, place, table, thread, x);
    if (tile.phase == GroupNormPhase::sums) return;
  }
  __syncthreads();

  const auto finish = [&](auto dropout) {  // compiled for either: testing the mask's bits costs an element four instructions
    constexpr bool drops = decltype(dropout)::value;
    constexpr int words = drops ? group_norm_mask_words<vector, items> : 1;
    const float kept_scale = a.dropout.scale;
    uint64_t keep[words] = {};
    if constexpr (drops) {
#pragma unroll
      for (int w = 0; w < words; ++w) keep[w] = group_norm_mask<vector, channels_last>(a, place, thread, w * group_norm_masked<vector>);
    }
    float pre_bias[own], centre[own], slope[own], offset[own];
    T* to = static_cast<T*>(a.y.data) + thread.offset;
    group_norm_each_unit<group_norm_by_unit<channels_last, vector, items>, items, vector / unit>(
        thread.items,
        [&](int u) {
#pragma unroll
          for (int j = u * unit; j < (u + 1) * unit; ++j) {
            if (j >= own) continue;
            const int32_t c = thread.entry(j);
            pre_bias[j] = table.pre_bias[c], centre[j] = table.centre[c], slope[j] = table.slope[c], offset[j] = table.offset[c];
          }
        },
        [&](int k, int u) {
          float values[unit];
          x[k].get(u, values);
#pragma unroll
          for (int j = 0; j < unit; ++j) {
            const int e = u * unit + j, c = channels_last ? e : 0, bit = k * vector + e;
            float z = (values[j] + pre_bias[c] - centre[c]) * slope[c] + offset[c];
            if (a.silu) z *= fast_sigmoid(z);
            if (drops) z = keep[bit / 64 % words] >> bit % 64 & 1 ? z * kept_scale : 0.0f;
            values[j] = z;
          }
          x[k].set(u, values);
        },
        [&](int k) {
          x[k].store(to);
          to += thread.stride;
        });
  };
  if (a.dropout.threshold) finish(std::true_type());
  else finish(std::false_type());
}

}  // namespace ddpm_fast::cuda
