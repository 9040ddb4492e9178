// What the bindings hand to a kernel: plain structs of pointers and sizes, no Python, no libtorch. Every tensor is contiguous,
// or as strided as is said here, and was checked by the caller, the values of t too.
#pragma once
#include "diffusion_math.h"
#include "dtype.h"

namespace ddpm_fast {

struct Sizes {
  int64_t samples;
  int64_t elements;  // of one sample
  int threads;
};

// ε: a tensor like the data, or drawn from a key where the tensor is null.
struct NoiseSource {
  View tensor;
  NoiseKey key;
  bool present;  // false: there is no noise
};

// A model's output: the prediction, and after it, in each sample, the half that gives the variance where there is one.
struct Output {
  View view;
  int64_t stride;  // elements of one sample: as many as the data's, or twice that
};

struct RandnArguments {
  View out;
  Sizes sizes;
  NoiseKey key;
};

struct QSampleArguments {
  View x_start, out;     // one dtype; a sample's elements are contiguous, stride elements from one sample to the next
  int64_t stride;
  const int64_t* t;      // (samples,); null: sample n takes row n
  const float* signal;   // (T,)
  const float* sigma;    // (T,), not read without noise
  NoiseSource noise;
  Sizes sizes;
};

struct SimpleLossArguments {
  Output out;
  View x_start;
  const int64_t* t;
  const float *weight, *x_start_coef, *noise_coef;  // (T,)
  NoiseSource noise;
  float* loss;             // (samples,), or null
  Output grad_out;         // like out, or null
  const float* grad_loss;  // (samples,) that grad_out is for; null: for ones
  Sizes sizes;
};

struct PStepArguments {
  View x_t;
  Output out, without;     // without: of guidance, or null
  float guidance;
  View previous;           // x̂0 of the step before, or null
  const int64_t* t;
  const float* table;      // (T, 8)
  NoiseSource noise;
  Variance variance;
  bool clip;
  View x_next, x_start;    // forward: results, x_start may be null
  View grad_next, grad_start;  // backward: of the results, either may be null
  View grad_x_t, grad_previous, grad_noise;  // backward: null where not wanted
  Output grad_out, grad_without;
  Sizes sizes;
};

// An operand that is broadcast: element (n, i) lies at n * sample_stride + i * element_stride; the latter is 0 or 1.
struct Broadcast {
  View view;
  int64_t sample_stride, element_stride;
};

struct GaussianKLArguments {
  Broadcast mean1, logvar1, mean2, logvar2;
  View kl;             // (samples, elements), or (samples,) where reduced, or null; the operands' dtype
  View grad_kl;        // like kl, what the gradients are for; null, where reduced: for ones
  View grads[4];       // null where not wanted; (samples, elements) of any dtype, or fp32 (samples,) where element_stride is 0
  bool reduced;
  Sizes sizes;
};

struct VlbTermsArguments {
  Output out;
  View x_start, x_t;
  const int64_t* t;
  const float* table;      // (T, 8)
  Variance variance;
  bool clip, exact_cdf, detach_mean;
  int levels;
  float* terms;             // (samples,), bits per dimension, or null
  Output grad_out;          // like out, or null
  const float* grad_terms;  // (samples,) that grad_out is for; null: for ones
  Sizes sizes;
};

// One value for each channel of each sample: row n starts n * stride elements into the view. Null where absent.
struct Rows {
  View view;
  int64_t stride;
};

// An element whose word of the mask (see group_norm_math.h) is below the threshold, 2^32 times the probability, becomes 0, the
// others are multiplied with the scale, 1 / (1 - probability). There is no dropout where the threshold is 0.
struct Dropout {
  uint32_t threshold;
  float scale;
  NoiseKey key;
};

// y = dropout(silu(((x + pre_bias) normalised · weight + bias) · (1 + scale) + shift)), each but the norm optional.
struct GroupNormArguments {
  View x, y;                      // (samples, channels, pixels), or with channels_last (samples, pixels, channels); one dtype
  bool channels_last;
  int64_t samples, channels, pixels, groups;
  float eps;
  bool silu;
  View weight, bias;              // (channels,) of one dtype, each null where absent
  Rows pre_bias, scale, shift;    // of one dtype
  Dropout dropout;
  float *mean, *rstd;             // (samples, groups), of x + pre_bias: written by forward, read by backward
  View grad_y, grad_x;            // backward: like x
  View grad_weight, grad_bias;    // backward: (channels,), null where not wanted
  Rows grad_pre_bias, grad_scale, grad_shift;  // backward: null where not wanted
  float* workspace;               // as many floats as the plan of the backend says
  int threads;
};

constexpr int conv3x3_panel = 32;  // output channels that a transformed weight has side by side

// y = conv(x, weight) + bias + residual: 3 × 3, stride 1, padding 1. All fp32.
struct Conv3x3Arguments {
  const float* x;         // (samples, height, width, channels_in)
  const float* weight;    // transformed: (panels, 16, channels_in, conv3x3_panel)
  const float* bias;      // (channels_out,), or null
  const float* residual;  // like y, or null
  float* y;               // (samples, height, width, channels_out)
  int64_t samples, height, width, channels_in, channels_out;
  int threads;
};

struct Conv3x3WeightArguments {
  const float* weight;    // (channels_out, channels_in, 3, 3), of these strides
  int64_t strides[4];
  int64_t channels_in, channels_out;
  float* transformed;     // (panels, 16, channels_in, conv3x3_panel)
  int threads;
};

// softmax(q kᵀ scale) v, for each sample and head over its tokens.
struct AttentionArguments {
  View qkv;                       // (samples, tokens, 3, heads, head_channels)
  View out;                       // (samples, tokens, heads, head_channels)
  float* logsumexp;               // (samples, heads, tokens), nats: written by forward where not null, read by backward
  int64_t samples, tokens, heads, head_channels;
  float scale;
  View grad_out, grad_qkv;        // backward: like out, like qkv
  float* workspace;               // as many floats as the plan says
};

}  // namespace ddpm_fast
