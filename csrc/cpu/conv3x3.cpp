// conv3x3: 3 × 3 convolution of stride 1 and padding 1 in channels_last, y = conv(x) + bias + residual. Reads x, U and the residual,
// writes y once; what lies between stays in the second-level cache.
#include "conv3x3.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

// Bᵀ of four values.
DDPM_INLINE void transform_input(const Vec (&d)[window], Vec (&v)[window]) {
  v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}
// Aᵀ of four values.
DDPM_INLINE void transform_output(const Vec (&m)[window], Vec (&y)[tile_size]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }

// One tile's Bᵀ d B for the channels of a register, to `v` and on from point to point.
template <bool partial>
DDPM_INLINE void transform_window(const float* const (&pixels)[points], int64_t channel, int count, float* v, int64_t v_stride) {
  Vec columns[window][window];  // (column, row): transformed down each column
  for (int j = 0; j < window; ++j) {
    Vec d[window];
    for (int i = 0; i < window; ++i) {
      const float* const p = pixels[i * window + j] + channel;
      d[i] = partial ? load(p, count, Vec{}) : load(p);
    }
    transform_input(d, columns[j]);
  }
  for (int i = 0; i < window; ++i) {
    const Vec d[window] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
    Vec transformed[window];
    transform_input(d, transformed);
    for (int j = 0; j < window; ++j) store(transformed[j], v + (i * window + j) * v_stride);
  }
}

// V of `count` tiles from `first` on. Pixels beyond the image's edge are read from `zeros`.
DDPM_INLINE void transform_tiles(const Conv3x3Arguments& a, const Tiling& tiling, int64_t first, int64_t count, const float* zeros,
                                 float* v) {
  const int64_t stride = tiling.v_stride();
  int64_t column = first % tiling.columns, row = first / tiling.columns % tiling.rows, sample = first / tiling.columns / tiling.rows;
  for (int64_t i = 0; i < count; ++i) {
    const float* pixels[points];
    for (int k = 0; k < points; ++k) {
      const int64_t h = row * tile_size - 1 + k / window, w = column * tile_size - 1 + k % window;
      const bool inside = (h >= 0) & (h < a.height) & (w >= 0) & (w < a.width);
      pixels[k] = inside ? a.x + ((sample * a.height + h) * a.width + w) * a.channels_in : zeros;
    }
    float* const target = v + i / group * tiling.chunks * group * chunk + i % group * chunk;
    int64_t c = 0;
    for (; c + lanes <= a.channels_in; c += lanes)
      transform_window<false>(pixels, c, lanes, target + c / chunk * group * chunk + c % chunk, stride);
    if (c < a.channels_in)
      transform_window<true>(pixels, c, int(a.channels_in - c), target + c / chunk * group * chunk + c % chunk, stride);
    if (++column == tiling.columns) {
      column = 0;
      if (++row == tiling.rows) row = 0, ++sample;
    }
  }
}

// M = V U for `rows` tiles of a group and some registers of output channels. However many tiles there are, each one's sums run over
// the input channels in their order.
template <int rows, int registers>
__attribute__((noinline)) void multiply(const float* v, const float* u, int64_t channels, float* m) {
  Vec sums[rows][registers];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < registers; ++k) sums[i][k] = Vec{};
  for (int64_t first = 0; first < channels; first += chunk, v += group * chunk) {
    const int count = channels - first < chunk ? int(channels - first) : chunk;
    for (int c = 0; c < count; ++c, u += panel) {
      Vec weights[registers];
#pragma GCC unroll 16
      for (int k = 0; k < registers; ++k) weights[k] = load(u + k * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
        for (int k = 0; k < registers; ++k) sums[i][k] += v[i * chunk + c] * weights[k];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < registers; ++k) store(sums[i][k], m + i * panel + k * lanes);
}

// The same for a number of tiles that is not known beforehand.
template <int most, int registers>
DDPM_INLINE void multiply_some(int rows, const float* v, const float* u, int64_t channels, float* m) {
  if (rows >= most) return multiply<most, registers>(v, u, channels, m);
  if constexpr (most > 1) multiply_some<most - 1, registers>(rows, v, u, channels, m);
}

// As many tiles at once as the sums of two registers each fit: 32 registers, or else 16.
constexpr int tiles_at_once = lanes == 16 ? group : group / 2;

// M of a panel whose first `used` channels are wanted.
DDPM_INLINE void multiply_panel(const Conv3x3Arguments& a, const Tiling& tiling, int64_t tiles, int used, const float* v, const float* u,
                                float* m) {
  for (int point = 0; point < points; ++point, u += a.channels_in * panel)
    for (int64_t i = 0; i < tiles; i += tiles_at_once) {
      const int rows = tiles - i < tiles_at_once ? int(tiles - i) : tiles_at_once;
      const float* const from = v + point * tiling.v_stride() + i / group * tiling.chunks * group * chunk + i % group * chunk;
      float* const to = m + point * tiling.m_stride() + i * panel;
      int k = 0;
      for (; k + lanes < used; k += 2 * lanes) multiply_some<tiles_at_once, 2>(rows, from, u + k, a.channels_in, to + k);
      if (k < used) multiply_some<tiles_at_once, 1>(rows, from, u + k, a.channels_in, to + k);
    }
}

// Aᵀ M A + bias + residual for the channels of a register, of the pixels of the tile that are inside the image.
template <bool partial>
DDPM_INLINE void transform_register(const Conv3x3Arguments& a, const float* m, int64_t m_stride,
                                    const int64_t (&pixels)[tile_size * tile_size], int64_t channel, int count) {
  Vec columns[window][tile_size];
  for (int j = 0; j < window; ++j) {
    const Vec down[window] = {load(m + j * m_stride), load(m + (window + j) * m_stride), load(m + (2 * window + j) * m_stride),
                              load(m + (3 * window + j) * m_stride)};
    transform_output(down, columns[j]);
  }
  const auto get = [&](const float* p) { return partial ? load(p, count, Vec{}) : load(p); };
  const Vec bias = a.bias ? get(a.bias + channel) : Vec{};
  for (int i = 0; i < tile_size; ++i) {
    const Vec along[window] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
    Vec y[tile_size];
    transform_output(along, y);
    for (int j = 0; j < tile_size; ++j) {
      const int64_t place = pixels[i * tile_size + j];
      if (place < 0) continue;
      Vec sum = y[j] + bias;
      if (a.residual) sum += get(a.residual + place + channel);
      if (partial) store(sum, a.y + place + channel, count);
      else store(sum, a.y + place + channel);
    }
  }
}

// y of `count` tiles from `first` on, in the `used` channels from `channel` on.
DDPM_INLINE void transform_panel(const Conv3x3Arguments& a, const Tiling& tiling, int64_t first, int64_t count, int64_t channel, int used,
                                 const float* m) {
  int64_t column = first % tiling.columns, row = first / tiling.columns % tiling.rows, sample = first / tiling.columns / tiling.rows;
  for (int64_t i = 0; i < count; ++i, m += panel) {
    int64_t pixels[tile_size * tile_size];
    for (int k = 0; k < tile_size * tile_size; ++k) {
      const int64_t h = row * tile_size + k / tile_size, w = column * tile_size + k % tile_size;
      pixels[k] = h < a.height && w < a.width ? ((sample * a.height + h) * a.width + w) * a.channels_out : -1;
    }
    int k = 0;
    for (; k + lanes <= used; k += lanes) transform_register<false>(a, m + k, tiling.m_stride(), pixels, channel + k, lanes);
    if (k < used) transform_register<true>(a, m + k, tiling.m_stride(), pixels, channel + k, used - k);
    if (++column == tiling.columns) {
      column = 0;
      if (++row == tiling.rows) row = 0, ++sample;
    }
  }
}

// U's.
constexpr int taps = 9;
typedef double Wide __attribute__((vector_size(4 * lanes)));  // half as many values as a Vec
typedef float Narrow __attribute__((vector_size(2 * lanes)));

// G of three values.
DDPM_INLINE void transform_taps(const Wide (&g)[3], Wide (&u)[window]) {
  u[0] = g[0], u[1] = 0.5 * (g[0] + g[1] + g[2]), u[2] = 0.5 * (g[0] - g[1] + g[2]), u[3] = g[2];
}

// G g Gᵀ for the output channels of a register from k on, to `u` and on from point to point.
DDPM_INLINE void transform_weight(const float (&g)[taps][panel], int k, float* u, int64_t u_stride) {
  Narrow transformed[2][points];
  for (int half = 0; half < 2; ++half) {
    Wide columns[3][window];  // (column, row): transformed down each column
    for (int j = 0; j < 3; ++j) {
      Wide down[3];
      for (int i = 0; i < 3; ++i) {
        Narrow values;
        std::memcpy(&values, &g[i * 3 + j][k + half * lanes / 2], sizeof values);
        down[i] = __builtin_convertvector(values, Wide);
      }
      transform_taps(down, columns[j]);
    }
    for (int i = 0; i < window; ++i) {
      const Wide along[3] = {columns[0][i], columns[1][i], columns[2][i]};
      Wide row[window];
      transform_taps(along, row);
      for (int j = 0; j < window; ++j) transformed[half][i * window + j] = __builtin_convertvector(row[j], Narrow);
    }
  }
  for (int point = 0; point < points; ++point)  // whole lines at a time: those of all points may share a set of the cache
    for (int half = 0; half < 2; ++half) std::memcpy(u + point * u_stride + half * lanes / 2, &transformed[half][point], sizeof(Narrow));
}

thread_local Scratch scratch;

}  // namespace

void conv3x3(const Conv3x3Arguments& a) {
  if (a.samples == 0) return;
  const Tiling tiling(a);
  const int64_t v_floats = points * tiling.v_stride(), m_floats = points * tiling.m_stride(), zeros_floats = tiling.chunks * chunk;
  const int64_t multiplications = tiling.tiles * points * a.channels_in * a.channels_out;
  // A task is a panel of a block. Where there are few blocks, threads share one, and each of them makes its V.
  parallel_ranges(tiling.blocks * tiling.panels, multiplications / multiplications_an_element, a.threads, [&](int64_t task, int64_t last) {
    float *const v = scratch.floats(v_floats + m_floats + zeros_floats), *const m = v + v_floats, *const zeros = m + m_floats;
    std::memset(zeros, 0, size_t(zeros_floats) * sizeof(float));
    for (int64_t made = -1; task < last; ++task) {
      const int64_t block = task / tiling.panels, first = block * tiling.block, channel = task % tiling.panels * panel;
      const int64_t count = tiling.tiles - first < tiling.block ? tiling.tiles - first : tiling.block;
      const int used = a.channels_out - channel < panel ? int(a.channels_out - channel) : panel;
      if (block != made) transform_tiles(a, tiling, first, count, zeros, v);
      made = block;
      multiply_panel(a, tiling, count, used, v, a.weight + channel * points * a.channels_in, m);
      transform_panel(a, tiling, first, count, channel, used, m);
    }
  });
}

// U of a weight of any strides, in float64 until it is stored; channels that fill up the last panel are zero. A task is a panel of a
// chunk of input channels: what it reads is laid down with the panel's channels side by side, and transformed a register at a time.
void conv3x3_weight(const Conv3x3WeightArguments& a) {
  const int64_t chunks = (a.channels_in + chunk - 1) / chunk, panels = (a.channels_out + panel - 1) / panel;
  const int64_t* const strides = a.weight.strides;
  parallel_ranges(panels * chunks, panels * panel * a.channels_in * points, a.threads, [&](int64_t task, int64_t last) {
    float g[chunk][taps][panel];
    for (; task < last; ++task) {
      const int64_t out = task / chunks * panel, in = task % chunks * chunk;
      const int64_t used = a.channels_out - out < panel ? a.channels_out - out : panel;
      const int64_t count = a.channels_in - in < chunk ? a.channels_in - in : chunk;
      if (used < panel) std::memset(g, 0, sizeof g);
      for (int64_t k = 0; k < used; ++k)
        for (int tap = 0; tap < taps; ++tap) {
          const float* const from = a.weight.data + (out + k) * strides[0] + in * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
          for (int64_t c = 0; c < count; ++c) g[c][tap][k] = from[c * strides[1]];
          __builtin_prefetch(from + chunk * strides[1]);  // the next task's: lines far apart, which no processor foresees
        }
      for (int64_t c = 0; c < count; ++c)
        for (int k = 0; k < panel; k += lanes)
          transform_weight(g[c], k, a.transformed + out * points * a.channels_in + (in + c) * panel + k, a.channels_in * panel);
    }
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
