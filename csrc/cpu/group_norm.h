// What group_norm's passes on the CPU share. The work is cut into slabs, which are normalised independently: groups of one sample
// in NCHW, one unless they are small; a whole sample in channels_last, where the values of all groups are mixed. A slab
// is cut into pieces, runs of pixels that stay in the first-level cache from one pass to the next.
//
// A piece is walked in strands: as many registers side by side as hide the latency of their arithmetic, which step through the
// pixels. In NCHW a register holds neighbouring pixels of one channel, in channels_last neighbouring channels of one pixel;
// that is all in which the layouts differ, so every formula is written once.
#pragma once
#include <type_traits>

#include "../common/group_norm_math.h"
#include "vector.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int64_t piece_elements = 4096;     // 16 KiB in fp32: x and a gradient fit the first-level cache
constexpr int64_t pieces_a_segment = 8;      // at least: enough work for a thread
constexpr int64_t segments_a_slab = 64;      // at most: what one slab can be shared out in
constexpr int64_t slabs_a_thread = 4;        // with fewer, slabs are shared out: otherwise the last one is waited for

template <typename T> struct Array {
  explicit Array(int64_t count) : data(new T[size_t(count > 0 ? count : 1)]) {}
  ~Array() { delete[] data; }
  Array(const Array&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
  void clear(int64_t count) const { std::memset(data, 0, size_t(count) * sizeof(T)); }
  T* const data;
};

DDPM_INLINE float value(const View& view, int64_t i) {
  switch (view.dtype) {
    case DType::bfloat16: return to_float(static_cast<const bfloat16_t*>(view.data)[i]);
    case DType::float16: return to_float(static_cast<const float16_t*>(view.data)[i]);
    default: return static_cast<const float*>(view.data)[i];
  }
}
DDPM_INLINE float value(const View& view, int64_t i, float absent) { return view.data ? value(view, i) : absent; }
DDPM_INLINE float value(const Rows& rows, int64_t n, int64_t c) { return value(rows.view, n * rows.stride + c, 0.0f); }
DDPM_INLINE void put(const View& view, int64_t i, float x) {
  switch (view.dtype) {
    case DType::bfloat16: return from_float(x, static_cast<bfloat16_t*>(view.data)[i]);
    case DType::float16: return from_float(x, static_cast<float16_t*>(view.data)[i]);
    default: static_cast<float*>(view.data)[i] = x;
  }
}

// How one call is cut up. It depends on sizes and layout alone, so that any number of threads gives the same bits.
struct Cut {
  Cut(const GroupNormArguments& a, bool channels_last)
      : channels_last(channels_last), channels_a_group(a.channels / a.groups), groups(channels_last ? a.groups : groups_together(a)),
        channels(groups * channels_a_group), pixels(a.pixels), all_channels(a.channels), slabs(a.samples * (a.groups / groups)) {
    const int64_t step = channels_last ? 1 : 4 * lanes, fitting = piece_elements / channels / step * step;
    range = fitting < step ? step : fitting;
    range = range < pixels ? range : pixels;
    const int64_t pieces = (pixels + range - 1) / range, together = (pieces + segments_a_slab - 1) / segments_a_slab;
    segment_pixels = (together > pieces_a_segment ? together : pieces_a_segment) * range;
    segments = (pixels + segment_pixels - 1) / segment_pixels;
  }
  int64_t elements() const { return channels * pixels; }  // of a slab
  int64_t sample(int64_t slab) const { return slab / (all_channels / channels); }
  int64_t first_group(int64_t slab) const { return slab % (all_channels / channels) * groups; }

  // Calls body(first pixel, pixels) for each piece of a segment.
  template <typename Body> DDPM_METHOD void each_piece(int64_t segment, const Body& body) const {
    const int64_t begin = segment * segment_pixels, end = begin + segment_pixels < pixels ? begin + segment_pixels : pixels;
    for (int64_t first = begin; first < end; first += range) body(first, end - first < range ? end - first : range);
  }
  // Whether each thread takes whole slabs, which then stay in its cache; or else segments of them.
  bool whole_slabs(int threads) const { return segments == 1 || threads == 1 || slabs % threads == 0 || slabs >= slabs_a_thread * threads; }

  const bool channels_last;
  const int64_t channels_a_group, groups, channels, pixels, all_channels, slabs;  // groups and channels: of a slab
  int64_t range, segment_pixels, segments;

 private:
  // Small groups of NCHW share what a slab costs.
  static int64_t groups_together(const GroupNormArguments& a) {
    int64_t count = piece_elements / (a.channels / a.groups * a.pixels);
    count = count < 1 ? 1 : count < a.groups ? count : a.groups;
    while (a.groups % count) --count;
    return count;
  }
};

// One strand: `registers` side by side, the first at element `offset` of the slab and `place` of the piece, taking `steps`
// steps of `stride` elements; of the last register `count` lanes are used. It belongs to `channel` and, in channels_last, those
// that follow.
template <int registers_, bool partial_, bool channels_last_> struct Strand {
  static constexpr int registers = registers_;
  static constexpr bool partial = partial_;
  int64_t channel, offset, place, stride, steps;
  int count;

  // What is needed of a per-channel array.
  DDPM_METHOD void coefficients(const float* values, Vec (&c)[registers]) const {
    for (int k = 0; k < registers; ++k)
      c[k] = !channels_last_ ? all(values[channel]) : partial ? load(values + channel, count, Vec{}) : load(values + channel + k * lanes);
  }
  // Adds sums over the strand to a per-channel array.
  DDPM_METHOD void add(const Vec (&sums)[registers], float* values) const {
    if (!channels_last_) {
      Vec total = sums[0];
      for (int k = 1; k < registers; ++k) total += sums[k];
      values[channel] += sum_of(total);
    } else {
      for (int k = 0; k < registers; ++k) {
        float* const target = values + channel + k * lanes;
        if (partial) store(load(target, count, Vec{}) + sums[k], target, count);
        else store(load(target) + sums[k], target);
      }
    }
  }
  // What dropout leaves of x: nothing where the mask is 0, of NaN too.
  DDPM_METHOD Vec masked(Vec x, const float* mask) const {
    const Vec factor = get(mask, Vec{});
    return select(factor != Vec{}, x * factor, Vec{});
  }
  template <typename T> DDPM_METHOD Vec get(const T* p, Vec rest) const { return partial ? load(p, count, rest) : load(p); }
  DDPM_METHOD Vec used(Vec x) const { return partial ? select(first_lanes(count), x, Vec{}) : x; }
  template <typename T> DDPM_METHOD void set(T* p, Vec x) const {
    if (partial) store(x, p, count);
    else store(x, p);
  }
};

// Calls body(strand) for the strands of pixels [first, first + range) of a slab.
template <bool channels_last, typename Body>
DDPM_INLINE void walk(const Cut& cut, int64_t first, int64_t range, const Body& body) {
  if (channels_last) {
    const int64_t stride = cut.channels, offset = first * stride;
    int64_t c = 0;
    for (; c + 4 * lanes <= stride; c += 4 * lanes) body(Strand<4, false, true>{c, offset + c, c, stride, range, lanes});
    for (; c + 2 * lanes <= stride; c += 2 * lanes) body(Strand<2, false, true>{c, offset + c, c, stride, range, lanes});
    for (; c + lanes <= stride; c += lanes) body(Strand<1, false, true>{c, offset + c, c, stride, range, lanes});
    if (c < stride) body(Strand<1, true, true>{c, offset + c, c, stride, range, int(stride - c)});
  } else {
    for (int64_t c = 0; c < cut.channels; ++c) {
      int64_t offset = c * cut.pixels + first, place = c * range;
      const int64_t wide = range / (4 * lanes), narrow = range % (4 * lanes) / lanes, rest = range % lanes;
      if (wide) body(Strand<4, false, false>{c, offset, place, 4 * lanes, wide, lanes});
      offset += wide * 4 * lanes, place += wide * 4 * lanes;
      if (narrow) body(Strand<1, false, false>{c, offset, place, lanes, narrow, lanes});
      offset += narrow * lanes, place += narrow * lanes;
      if (rest) body(Strand<1, true, false>{c, offset, place, lanes, 1, int(rest)});
    }
  }
}

// What each element of a piece is multiplied with by dropout: 0 or 1 / (1 - p).
class Mask {
 public:
  Mask(const GroupNormArguments& a, const Cut& cut)
      : key_(a.dropout.key), rounds_(key_.seed), threshold_(a.dropout.threshold), factor_(a.dropout.scale), cut_(cut),
        values_(threshold_ ? cut.channels * cut.range + 2 * normals_at_once : 0), present_(threshold_) {}

  // In the piece's order; null where there is no dropout. Good until the next call.
  DDPM_METHOD const float* piece(int64_t slab, int64_t first, int64_t range) {
    if (!present_) return nullptr;
    const uint64_t sample = key_.first_sample + uint64_t(cut_.sample(slab));
    if (cut_.channels_last) return draw(sample, first * cut_.channels, range * cut_.channels);
    for (int64_t c = 0; c < cut_.channels; ++c) {
      const int64_t channel = cut_.first_group(slab) * cut_.channels_a_group + c;
      gather(sample, first * cut_.all_channels + channel, cut_.all_channels, range, values_.data + c * range);
    }
    return values_.data;
  }

 private:
  // Of neighbouring indices.
  DDPM_METHOD const float* draw(uint64_t sample, int64_t first, int64_t count) {
    const int64_t skipped = first % 4;
    for (int64_t i = 0; i < skipped + count; i += normals_at_once) {
      uint64_t blocks[counters_at_once];
      for (int k = 0; k < counters_at_once; ++k) blocks[k] = uint64_t(first / 4 + i / 4 + k);
      uint32_t drawn[normals_at_once];
      words_of(blocks, sample, drawn);
      for (int k = 0; k < normals_at_once; ++k) values_[i + k] = dropout_keeps(drawn[k], threshold_) ? factor_ : 0.0f;
    }
    return values_.data + skipped;
  }
  // Of every stride-th index.
  DDPM_METHOD void gather(uint64_t sample, int64_t first, int64_t stride, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += counters_at_once) {
      uint64_t blocks[counters_at_once];
      for (int k = 0; k < counters_at_once; ++k) blocks[k] = uint64_t((first + (i + k) * stride) / 4);
      uint32_t drawn[normals_at_once];
      words_of(blocks, sample, drawn);
      for (int k = 0; k < counters_at_once && i + k < count; ++k)
        out[i + k] = dropout_keeps(drawn[4 * k + (first + (i + k) * stride) % 4], threshold_) ? factor_ : 0.0f;
    }
  }
  DDPM_METHOD void words_of(const uint64_t (&blocks)[counters_at_once], uint64_t sample, uint32_t* out) {
    Counters counters[2];
    for (int k = 0; k < 2; ++k) {
      wide j{};
      for (int i = 0; i < words; ++i) j[i] = blocks[k * words + place(i)];
      counters[k] = {j, everywhere(key_.stream), everywhere(uint32_t(sample)), everywhere(sample >> 32)};
    }
    encipher(counters, rounds_);
    for (int k = 0; k < 2; ++k) {
      const Counters& c = counters[k];
      floats low, high;
      interleave((floats)((c.c0 & 0xffffffffu) | (c.c2 << 32)), (floats)((c.c1 & 0xffffffffu) | (c.c3 << 32)), low, high);
      std::memcpy(out + k * 4 * words, &low, sizeof low);
      std::memcpy(out + k * 4 * words + 2 * words, &high, sizeof high);
    }
  }

  const NoiseKey key_;
  const RoundKeys rounds_;
  const uint32_t threshold_;
  const float factor_;
  const Cut& cut_;
  const Array<float> values_;
  const bool present_;
};

// z = (x + bias - center) slope + offset, for each channel of a slab.
struct Affine {
  // What of it a strand needs, in registers.
  template <typename Strand> struct Along {
    DDPM_METHOD Along(const Strand& strand, const Affine& affine) : biased(affine.biased) {
      strand.coefficients(affine.bias.data, bias);
      strand.coefficients(affine.center.data, center);
      strand.coefficients(affine.slope.data, slope);
      strand.coefficients(affine.offset.data, offset);
    }
    // x + bias - center for the registers at x: the sum first, as the formula rounds it. 0 in lanes that are not used.
    template <typename T> DDPM_METHOD void distances(const Strand& strand, const T* x, Vec (&distance)[Strand::registers]) const {
      for (int k = 0; k < Strand::registers; ++k) distance[k] = strand.get(x + k * lanes, Vec{});
      if (biased)
        for (int k = 0; k < Strand::registers; ++k) distance[k] += bias[k];
      for (int k = 0; k < Strand::registers; ++k) distance[k] = strand.used(distance[k] - center[k]);
    }
    Vec bias[Strand::registers], center[Strand::registers], slope[Strand::registers], offset[Strand::registers];
    const bool biased;
  };
  explicit Affine(const GroupNormArguments& a, int64_t channels)
      : bias(channels), center(channels), slope(channels), offset(channels), biased(a.pre_bias.view.data) {}
  // From the statistics of the slab's groups, and the parameters.
  DDPM_METHOD void prepare(const GroupNormArguments& a, const Cut& cut, int64_t slab) {
    const int64_t n = cut.sample(slab), g0 = cut.first_group(slab);
    for (int64_t g = 0, c = 0; g < cut.groups; ++g) {
      const float mean = a.mean[n * a.groups + g0 + g], rstd = a.rstd[n * a.groups + g0 + g];
      for (int64_t i = 0; i < cut.channels_a_group; ++i, ++c) {
        const int64_t channel = g0 * cut.channels_a_group + c;
        const float film = 1.0f + value(a.scale, n, channel);
        bias[c] = value(a.pre_bias, n, channel);
        center[c] = mean;
        slope[c] = rstd * (value(a.weight, channel, 1.0f) * film);
        offset[c] = value(a.bias, channel, 0.0f) * film + value(a.shift, n, channel);
      }
    }
  }
  const Array<float> bias, center, slope, offset;
  const bool biased;
};

// Calls run(type of the data, layout as a type).
template <typename Run> DDPM_INLINE void for_type_and_layout(const GroupNormArguments& a, const Run& run) {
  const auto with_layout = [&](auto t) {
    // One pixel is the same in both layouts, and channels side by side fill the registers.
    if (a.channels_last || a.pixels == 1) run(t, std::true_type{});
    else run(t, std::false_type{});
  };
  switch (a.x.dtype) {
    case DType::bfloat16: return with_layout(bfloat16_t{});
    case DType::float16: return with_layout(float16_t{});
    default: with_layout(float{});
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
