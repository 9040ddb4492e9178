// group_norm, backward. With d = x + pre_bias - mean, z = d rstd A + B and dz = dL/dz, which follows from grad_y and from z computed
// again, two passes: the sums of dz, dz d and d over each channel of a sample, of which all gradients of parameters are made; then
// grad_x = rstd (A dz - (Σ A dz + d rstd² Σ A dz d) / count), the sums over a group. The second pass finds x and grad_y in the
// cache where a slab fits it.
#include "group_norm.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int64_t kept_elements = 1 << 17;  // 512 KiB, which the second-level cache has room for

// Over the pixels of one channel.
struct Sums { double dz, products, distances; };

template <typename T, bool channels_last> class Backward {
 public:
  // With `keep`, what `sums` computes of a slab is kept for `apply`, which otherwise computes it again.
  Backward(const GroupNormArguments& a, const Cut& cut, bool keep)
      : a_(a), cut_(cut), dz_(cut.channels), products_(cut.channels), distances_(cut.channels), affine_(a, cut.channels),
        linear_(cut.channels), constant_(cut.channels), mask_(a, cut), kept_(keep ? cut.elements() : 0), keeps_(keep) {}

  DDPM_METHOD void prepare(int64_t slab) { affine_.prepare(a_, cut_, slab); }

  // Of each channel over one segment.
  DDPM_METHOD void sums(int64_t slab, int64_t segment, Sums* channels) {
    const T* const x = static_cast<const T*>(a_.x.data) + slab * cut_.elements();
    const T* const grad_y = static_cast<const T*>(a_.grad_y.data) + slab * cut_.elements();
    float* const kept = keeps_ ? kept_.data : nullptr;
    for (int64_t c = 0; c < cut_.channels; ++c) channels[c] = {};
    cut_.each_piece(segment, [&](int64_t first, int64_t range) {
      const float* const mask = mask_.piece(slab, first, range);
      dz_.clear(cut_.channels), products_.clear(cut_.channels), distances_.clear(cut_.channels);
      walk<channels_last>(cut_, first, range, [&, x, grad_y, mask, kept, silu = a_.silu](auto strand) {
        constexpr int registers = decltype(strand)::registers;
        const Affine::Along<decltype(strand)> affine(strand, affine_);
        Vec dz_sum[registers] = {}, products[registers] = {}, distances[registers] = {};
        for (int64_t s = 0; s < strand.steps; ++s) {
          Vec distance[registers], dz[registers];
          slopes(strand, affine, x, grad_y, mask, s * strand.stride, silu, distance, dz);
          if (kept)
            for (int k = 0; k < registers; ++k) strand.set(kept + strand.offset + s * strand.stride + k * lanes, dz[k]);
          for (int k = 0; k < registers; ++k) {
            dz_sum[k] += dz[k];
            products[k] += dz[k] * distance[k];
            distances[k] += distance[k];
          }
        }
        strand.add(dz_sum, dz_.data);
        strand.add(products, products_.data);
        strand.add(distances, distances_.data);
      });
      for (int64_t c = 0; c < cut_.channels; ++c)
        channels[c] = {channels[c].dz + double(dz_[c]), channels[c].products + double(products_[c]),
                       channels[c].distances + double(distances_[c])};
    });
  }

  // From the sums over a slab: what `apply` needs, and the gradients of the parameters that each sample has of its own. With `all`,
  // of (samples, channels), leaves there what those of weight and bias are summed from. Writes nothing for others unless `first`.
  DDPM_METHOD void finish(int64_t slab, const Sums* channels, Sums* all, bool first) {
    const int64_t n = cut_.sample(slab), g0 = cut_.first_group(slab), per_group = cut_.channels_a_group;
    const double share = 1.0 / (double(per_group) * double(cut_.pixels));
    for (int64_t g = 0, c = 0; g < cut_.groups; ++g, c += per_group) {
      const double rstd = double(a_.rstd[n * a_.groups + g0 + g]);
      double constant = 0, linear = 0;  // Σ rstd A dz / count and Σ rstd A dz d rstd² / count, over the group
      for (int64_t i = c; i < c + per_group; ++i) {
        constant += double(affine_.slope[i]) * channels[i].dz * share;
        linear += double(affine_.slope[i]) * channels[i].products * (rstd * rstd) * share;
      }
      for (int64_t i = c; i < c + per_group; ++i) {
        const int64_t channel = g0 * per_group + i;
        const Sums& sums = channels[i];
        const double products = sums.products * rstd;
        constant_[i] = float(constant);
        linear_[i] = float(linear);
        if (!first) continue;
        if (all) all[n * a_.channels + channel] = {sums.dz, products, 0};
        put(a_.grad_shift, n, channel, sums.dz);
        if (a_.grad_scale.view.data)
          put(a_.grad_scale, n, channel,
              double(value(a_.weight, channel, 1.0f)) * products + double(value(a_.bias, channel, 0.0f)) * sums.dz);
        put(a_.grad_pre_bias, n, channel, double(affine_.slope[i]) * sums.dz - double(cut_.pixels) * constant - linear * sums.distances);
      }
    }
  }

  DDPM_METHOD void apply(int64_t slab, int64_t segment) {
    const T* const x = static_cast<const T*>(a_.x.data) + slab * cut_.elements();
    const T* const grad_y = static_cast<const T*>(a_.grad_y.data) + slab * cut_.elements();
    T* const grad_x = static_cast<T*>(a_.grad_x.data) + slab * cut_.elements();
    const float* const kept = keeps_ ? kept_.data : nullptr;
    cut_.each_piece(segment, [&](int64_t first, int64_t range) {
      const float* const mask = kept ? nullptr : mask_.piece(slab, first, range);
      walk<channels_last>(cut_, first, range, [&, x, grad_y, grad_x, mask, kept, silu = a_.silu](auto strand) {
        constexpr int registers = decltype(strand)::registers;
        const Affine::Along<decltype(strand)> affine(strand, affine_);
        Vec constant[registers], linear[registers];
        strand.coefficients(constant_.data, constant);
        strand.coefficients(linear_.data, linear);
        for (int64_t s = 0; s < strand.steps; ++s) {
          Vec distance[registers], dz[registers];
          if (kept) {
            affine.distances(strand, x + strand.offset + s * strand.stride, distance);
            for (int k = 0; k < registers; ++k) dz[k] = strand.get(kept + strand.offset + s * strand.stride + k * lanes, Vec{});
          } else {
            slopes(strand, affine, x, grad_y, mask, s * strand.stride, silu, distance, dz);
          }
          for (int k = 0; k < registers; ++k) {
            const Vec grad = dz[k] * affine.slope[k] - (distance[k] * linear[k] + constant[k]);
            strand.set(grad_x + strand.offset + s * strand.stride + k * lanes, grad);
          }
        }
      });
    });
  }

 private:
  // d and dz at one step of a strand.
  template <typename Strand>
  DDPM_METHOD static void slopes(const Strand& strand, const Affine::Along<Strand>& affine, const T* x, const T* grad_y, const float* mask,
                                 int64_t at, bool silu, Vec (&distance)[Strand::registers], Vec (&dz)[Strand::registers]) {
    affine.distances(strand, x + strand.offset + at, distance);
    for (int k = 0; k < Strand::registers; ++k) dz[k] = strand.get(grad_y + strand.offset + at + k * lanes, Vec{});
    if (mask)
      for (int k = 0; k < Strand::registers; ++k) dz[k] = strand.masked(dz[k], mask + strand.place + at + k * lanes);
    if (!silu) return;
    Vec z[Strand::registers], sigmoid[Strand::registers];
    for (int k = 0; k < Strand::registers; ++k) z[k] = distance[k] * affine.slope[k] + affine.offset[k];
    sigmoids<false>(z, sigmoid);
    for (int k = 0; k < Strand::registers; ++k) dz[k] *= silu_slope(z[k], sigmoid[k]);
  }

  DDPM_METHOD static void put(const Rows& rows, int64_t n, int64_t c, double x) {
    if (rows.view.data) DDPM_ISA::put(rows.view, n * rows.stride + c, float(x));
  }

  const GroupNormArguments& a_;
  const Cut& cut_;
  const Array<float> dz_, products_, distances_;
  Affine affine_;
  const Array<float> linear_, constant_;
  Mask mask_;
  const Array<float> kept_;
  const bool keeps_;
};

// Gradients of weight and bias: over the samples, in their order.
void finish_weights(const GroupNormArguments& a, const Sums* all) {
  for (int64_t c = 0; all && c < a.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t n = 0; n < a.samples; ++n) {
      const double film = 1.0 + double(value(a.scale, n, c));
      weight += film * all[n * a.channels + c].products;
      bias += film * all[n * a.channels + c].dz;
    }
    if (a.grad_weight.data) put(a.grad_weight, c, float(weight));
    if (a.grad_bias.data) put(a.grad_bias, c, float(bias));
  }
}

template <typename T, bool channels_last> void backward(const GroupNormArguments& a) {
  const Cut cut(a, channels_last);
  const int64_t elements = a.samples * a.channels * a.pixels;
  const bool weights = a.grad_weight.data || a.grad_bias.data;
  const Array<Sums> everything(weights ? a.samples * a.channels : 0);
  Sums* const all = weights ? everything.data : nullptr;
  using State = Backward<T, channels_last>;
  const auto add = [&](Sums* total, const Sums* part) {
    for (int64_t c = 0; c < cut.channels; ++c)
      total[c] = {total[c].dz + part[c].dz, total[c].products + part[c].products, total[c].distances + part[c].distances};
  };
  if (cut.whole_slabs(a.threads)) {
    parallel_ranges(cut.slabs, elements, a.threads, [&](int64_t slab, int64_t last) {
      State state(a, cut, cut.elements() <= kept_elements);
      const Array<Sums> total(cut.channels), part(cut.channels);
      for (; slab < last; ++slab) {
        state.prepare(slab);
        state.sums(slab, 0, total.data);
        for (int64_t segment = 1; segment < cut.segments; ++segment) {
          state.sums(slab, segment, part.data);
          add(total.data, part.data);
        }
        state.finish(slab, total.data, all, true);
        for (int64_t segment = 0; a.grad_x.data && segment < cut.segments; ++segment) state.apply(slab, segment);
      }
    });
    return finish_weights(a, all);
  }
  const int64_t tasks = cut.slabs * cut.segments;
  const Array<Sums> parts(tasks * cut.channels);
  const auto total = [&](int64_t slab) { return parts.data + slab * cut.segments * cut.channels; };
  parallel_ranges(tasks, elements, a.threads, [&](int64_t task, int64_t last) {
    State state(a, cut, false);
    for (int64_t slab = -1; task < last; ++task) {
      if (slab != task / cut.segments) state.prepare(slab = task / cut.segments);
      state.sums(slab, task % cut.segments, parts.data + task * cut.channels);
    }
  });
  for (int64_t slab = 0; slab < cut.slabs; ++slab)
    for (int64_t segment = 1; segment < cut.segments; ++segment) add(total(slab), total(slab) + segment * cut.channels);
  parallel_ranges(tasks, elements, a.threads, [&](int64_t task, int64_t last) {
    State state(a, cut, false);
    for (int64_t slab = -1; task < last; ++task) {
      if (slab != task / cut.segments) {
        state.prepare(slab = task / cut.segments);
        state.finish(slab, total(slab), all, task % cut.segments == 0);
      }
      if (a.grad_x.data) state.apply(slab, task % cut.segments);
    }
  });
  finish_weights(a, all);
}

}  // namespace

void group_norm_backward(const GroupNormArguments& a) {
  for_type_and_layout(a, [&](auto t, auto layout) { backward<decltype(t), decltype(layout)::value>(a); });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
