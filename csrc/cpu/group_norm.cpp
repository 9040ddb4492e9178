// group_norm, forward: the statistics of each group, then norm, weight and bias, FiLM, SiLU and dropout in one pass. Reads x twice,
// the second time from the cache where a slab fits it; writes y, and the mean and 1 / deviation of each group.
#include "group_norm.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

// Mean of `count` values and sum of their squared distances from it; merged as Chan, Golub and LeVeque (1979) do.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  DDPM_METHOD void merge(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean, share = other.count / total;
    squares += other.squares + distance * distance * (count * share);
    mean = count == 0 ? other.mean : mean + distance * share;
    count = total;
  }
};

template <typename T, bool channels_last> class Forward {
 public:
  Forward(const GroupNormArguments& a, const Cut& cut)
      : a_(a), cut_(cut), sums_(cut.channels), squares_(cut.channels), affine_(a, cut.channels), mask_(a, cut) {}

  // Moments of each group over one segment. Distances are taken from a center near the mean, whose own distance from it is
  // then known: first from the mean of an eighth of the first piece, afterwards from the mean of what has been seen. That
  // loses at most three bits however the values lie: a center far off means that the variance is as large.
  DDPM_METHOD void moments(int64_t slab, int64_t segment, Moments* groups) {
    const int64_t n = cut_.sample(slab), g0 = cut_.first_group(slab), per_group = cut_.channels_a_group;
    const T* const x = static_cast<const T*>(a_.x.data) + slab * cut_.elements();
    for (int64_t g = 0; g < cut_.groups; ++g) groups[g] = {};
    for (int64_t c = 0; c < cut_.channels; ++c) {
      affine_.bias[c] = value(a_.pre_bias, n, g0 * per_group + c);
      affine_.slope[c] = affine_.offset[c] = 0;  // not needed yet
    }
    cut_.each_piece(segment, [&](int64_t first, int64_t range) {
      if (groups[0].count == 0) {
        const int64_t part = (range + 7) / 8;
        sums_.clear(cut_.channels);
        walk<channels_last>(cut_, first, part, [&](auto strand) {
          constexpr int registers = decltype(strand)::registers;
          Vec sums[registers] = {};
          for (int64_t s = 0; s < strand.steps; ++s)
            for (int k = 0; k < registers; ++k) sums[k] += strand.get(x + strand.offset + s * strand.stride + k * lanes, Vec{});
          strand.add(sums, sums_.data);
        });
        for (int64_t g = 0, c = 0; g < cut_.groups; ++g) {
          double total = 0;
          for (int64_t i = 0; i < per_group; ++i, ++c) total += double(sums_[c]) + double(part) * double(affine_.bias[c]);
          groups[g].mean = total / double(part * per_group);
        }
      }
      for (int64_t g = 0, c = 0; g < cut_.groups; ++g) {
        const float mean = float(groups[g].mean);
        for (int64_t i = 0; i < per_group; ++i, ++c) affine_.center[c] = mean;
      }
      sums_.clear(cut_.channels);
      squares_.clear(cut_.channels);
      walk<channels_last>(cut_, first, range, [&](auto strand) {
        constexpr int registers = decltype(strand)::registers;
        const Affine::Along<decltype(strand)> affine(strand, affine_);
        Vec sums[registers] = {}, squares[registers] = {};
        for (int64_t s = 0; s < strand.steps; ++s) {
          Vec distance[registers];
          affine.distances(strand, x + strand.offset + s * strand.stride, distance);
          for (int k = 0; k < registers; ++k) {
            sums[k] += distance[k];
            squares[k] += distance[k] * distance[k];
          }
        }
        strand.add(sums, sums_.data);
        strand.add(squares, squares_.data);
      });
      const double count = double(range * per_group), share = 1.0 / count;
      for (int64_t g = 0, c = 0; g < cut_.groups; ++g, c += per_group) {
        double total = 0, squares = 0;
        for (int64_t i = 0; i < per_group; ++i) total += double(sums_[c + i]), squares += double(squares_[c + i]);
        const double shift = total * share;
        groups[g].merge({count, double(affine_.center[c]) + shift, squares - total * shift});
      }
    });
  }

  DDPM_METHOD void finish(int64_t slab, const Moments* groups) const {
    const int64_t at = cut_.sample(slab) * a_.groups + cut_.first_group(slab);
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const double variance = groups[g].squares / groups[g].count;
      a_.mean[at + g] = float(groups[g].mean);
      a_.rstd[at + g] = float(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + double(a_.eps)));
    }
  }

  DDPM_METHOD void prepare(int64_t slab) { affine_.prepare(a_, cut_, slab); }

  DDPM_METHOD void apply(int64_t slab, int64_t segment) {
    const T* const x = static_cast<const T*>(a_.x.data) + slab * cut_.elements();
    T* const y = static_cast<T*>(a_.y.data) + slab * cut_.elements();
    cut_.each_piece(segment, [&](int64_t first, int64_t range) {
      const float* const mask = mask_.piece(slab, first, range);
      walk<channels_last>(cut_, first, range, [&, x, y, mask, silu = a_.silu](auto strand) {
        constexpr int registers = decltype(strand)::registers;
        const Affine::Along<decltype(strand)> affine(strand, affine_);
        for (int64_t s = 0; s < strand.steps; ++s) {
          const int64_t i = s * strand.stride;
          Vec z[registers];
          affine.distances(strand, x + strand.offset + i, z);
          for (int k = 0; k < registers; ++k) z[k] = z[k] * affine.slope[k] + affine.offset[k];
          if (silu) {
            Vec sigmoid[registers];
            sigmoids<std::is_same<T, bfloat16_t>::value>(z, sigmoid);
            for (int k = 0; k < registers; ++k) z[k] *= sigmoid[k];
          }
          if (mask)
            for (int k = 0; k < registers; ++k) z[k] = strand.masked(z[k], mask + strand.place + i + k * lanes);
          for (int k = 0; k < registers; ++k) strand.set(y + strand.offset + i + k * lanes, z[k]);
        }
      });
    });
  }

 private:
  const GroupNormArguments& a_;
  const Cut& cut_;
  const Array<float> sums_, squares_;
  Affine affine_;
  Mask mask_;
};

template <typename T, bool channels_last> void forward(const GroupNormArguments& a) {
  const Cut cut(a, channels_last);
  const int64_t elements = a.samples * a.channels * a.pixels;
  using State = Forward<T, channels_last>;
  if (cut.whole_slabs(a.threads)) {
    parallel_ranges(cut.slabs, elements, a.threads, [&](int64_t slab, int64_t last) {
      State state(a, cut);
      const Array<Moments> total(cut.groups), part(cut.groups);
      for (; slab < last; ++slab) {
        state.moments(slab, 0, total.data);
        for (int64_t segment = 1; segment < cut.segments; ++segment) {
          state.moments(slab, segment, part.data);
          for (int64_t g = 0; g < cut.groups; ++g) total[g].merge(part[g]);
        }
        state.finish(slab, total.data);
        state.prepare(slab);
        for (int64_t segment = 0; segment < cut.segments; ++segment) state.apply(slab, segment);
      }
    });
    return;
  }
  const int64_t tasks = cut.slabs * cut.segments;
  const Array<Moments> parts(tasks * cut.groups);
  parallel_ranges(tasks, elements, a.threads, [&](int64_t task, int64_t last) {
    State state(a, cut);
    for (; task < last; ++task) state.moments(task / cut.segments, task % cut.segments, parts.data + task * cut.groups);
  });
  const State state(a, cut);
  for (int64_t slab = 0; slab < cut.slabs; ++slab) {
    Moments* const total = parts.data + slab * cut.segments * cut.groups;
    for (int64_t i = cut.groups; i < cut.segments * cut.groups; ++i) total[i % cut.groups].merge(total[i]);
    state.finish(slab, total);
  }
  parallel_ranges(tasks, elements, a.threads, [&](int64_t task, int64_t last) {
    State state(a, cut);
    for (int64_t slab = -1; task < last; ++task) {
      if (slab != task / cut.segments) state.prepare(slab = task / cut.segments);
      state.apply(slab, task % cut.segments);
    }
  });
}

}  // namespace

void group_norm(const GroupNormArguments& a) {
  for_type_and_layout(a, [&](auto t, auto layout) { forward<decltype(t), decltype(layout)::value>(a); });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
