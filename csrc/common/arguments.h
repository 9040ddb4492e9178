// What the bindings hand to a kernel: plain structs of pointers and sizes, no Python, no libtorch. Every tensor is contiguous,
// or as strided as is said here. The binding checks memory, dtype and strides; shapes, devices and the values of t are the caller's.
//
// `fields` names what a struct has, in order, and is all that is written about it: the bindings call kernels by these names
// (python/kernel.h), and tests lay a struct out by them. A visitor is called as visit(name, field) or visit(name, field, rule).
#pragma once
#include "diffusion_math.h"
#include "dtype.h"

namespace ddpm_fast {

// Whether a field must be given. Two kernels may share a struct, the second mostly backward of the first.
enum class Need { absent, optional, required };
struct Use { Need first, second; };
constexpr Use required{Need::required, Need::required}, optional{Need::optional, Need::optional};
constexpr Use in_first{Need::required, Need::absent}, optional_in_first{Need::optional, Need::absent};
constexpr Use in_second{Need::absent, Need::required}, optional_in_second{Need::absent, Need::optional};
constexpr Use needed_in_first{Need::required, Need::optional};

struct Rule {
  Use use = required;
  const View* like = nullptr;  // whose dtype it has
  bool channels_last = false;  // contiguous in that order
};

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

// (samples, elements): each sample is contiguous, and begins stride elements after the one before.
struct Rows {
  View view;
  int64_t stride;
};

// A model's output: the prediction, and after it, in each sample, the half that gives the variance where there is one. The stride is
// as many elements as the data have, or twice that.
using Output = Rows;

struct RandnArguments {
  Sizes sizes;
  View out;
  NoiseKey key;
};
template <typename Visit>
void fields(Visit& visit, RandnArguments& a) {
  visit("sizes", a.sizes);
  visit("out", a.out);
  visit("key", a.key);
}

// Also scale, the gradient of either term: signal[t] x_start.
struct QSampleArguments {
  Sizes sizes;
  Rows x_start, out;     // one dtype
  const int64_t* t;      // (samples,); null: sample n takes row n
  const float* signal;   // (T,)
  const float* sigma;    // (T,), not read without noise
  NoiseSource noise;
};
template <typename Visit>
void fields(Visit& visit, QSampleArguments& a) {
  visit("sizes", a.sizes);
  visit("x_start", a.x_start);
  visit("t", a.t, {needed_in_first});
  visit("signal", a.signal);
  visit("sigma", a.sigma, {in_first});
  visit("noise", a.noise, {in_first, &a.x_start.view});
  visit("out", a.out, {required, &a.x_start.view});
}

struct SimpleLossArguments {
  Sizes sizes;
  Output model_output;
  View x_start;
  const int64_t* t;
  const float *weight, *x_start_coef, *noise_coef;  // (T,)
  NoiseSource noise;
  float* loss;               // (samples,), or null
  Output grad_model_output;  // like model_output, or null
  const float* grad_loss;    // (samples,) that grad_model_output is for; null: for ones
};
template <typename Visit>
void fields(Visit& visit, SimpleLossArguments& a) {
  visit("sizes", a.sizes);
  visit("model_output", a.model_output);
  visit("x_start", a.x_start);
  visit("t", a.t);
  visit("weight", a.weight);
  visit("x_start_coef", a.x_start_coef);
  visit("noise_coef", a.noise_coef);
  visit("noise", a.noise, {required, &a.x_start});
  visit("loss", a.loss, {optional});
  visit("grad_loss", a.grad_loss, {optional});
  visit("grad_model_output", a.grad_model_output, {optional, &a.model_output.view});
}

struct PStepArguments {
  Sizes sizes;
  View x_t;
  Output model_output, without;  // without: of guidance, or null
  float guidance;
  View x_start_previous;   // x̂0 of the step before, or null
  const int64_t* t;
  const float* table;      // (T, 8)
  NoiseSource noise;
  Variance variance;
  bool clip;
  View x_next, x_start;    // forward: results, x_start may be null
  View grad_x_next, grad_x_start;  // backward: of the results, either may be null
  View grad_x_t, grad_x_start_previous, grad_noise;  // backward: null where not wanted
  Output grad_model_output, grad_without;
};
template <typename Visit>
void fields(Visit& visit, PStepArguments& a) {
  visit("sizes", a.sizes);
  visit("x_t", a.x_t);
  visit("model_output", a.model_output);
  visit("t", a.t);
  visit("table", a.table);
  visit("noise", a.noise, {required, &a.x_t});
  visit("variance", a.variance);
  visit("clip", a.clip);
  visit("x_start_previous", a.x_start_previous, {optional, &a.x_t});
  visit("without", a.without, {optional, &a.model_output.view});
  visit("guidance", a.guidance);
  visit("x_next", a.x_next, {in_first, &a.x_t});
  visit("x_start", a.x_start, {optional_in_first, &a.x_t});
  visit("grad_x_next", a.grad_x_next, {optional_in_second, &a.x_t});
  visit("grad_x_start", a.grad_x_start, {optional_in_second, &a.x_t});
  visit("grad_x_t", a.grad_x_t, {optional_in_second, &a.x_t});
  visit("grad_model_output", a.grad_model_output, {optional_in_second, &a.model_output.view});
  visit("grad_noise", a.grad_noise, {optional_in_second, &a.x_t});
  visit("grad_x_start_previous", a.grad_x_start_previous, {optional_in_second, &a.x_t});
  visit("grad_without", a.grad_without, {optional_in_second, &a.model_output.view});
}

// An operand that is broadcast: element (n, i) lies at n * sample_stride + i * element_stride; the latter is 0 or 1.
struct Broadcast {
  View view;
  int64_t sample_stride, element_stride;
};

struct GaussianKLArguments {
  Sizes sizes;
  Broadcast mean1, logvar1, mean2, logvar2;
  View kl;             // (samples, elements), or (samples,) where reduced, or null; the operands' dtype
  View grad_kl;        // like kl, what the gradients are for; null, where reduced: for ones
  View grads[4];       // null where not wanted; (samples, elements) of any dtype, or fp32 (samples,) where element_stride is 0
  bool reduced;
};
template <typename Visit>
void fields(Visit& visit, GaussianKLArguments& a) {
  visit("sizes", a.sizes);
  visit("mean1", a.mean1);
  visit("logvar1", a.logvar1, {required, &a.mean1.view});
  visit("mean2", a.mean2, {required, &a.mean1.view});
  visit("logvar2", a.logvar2, {required, &a.mean1.view});
  visit("reduced", a.reduced);
  visit("kl", a.kl, {optional, &a.mean1.view});
  visit("grad_kl", a.grad_kl, {optional, &a.mean1.view});
  visit("grad_mean1", a.grads[0], {optional});
  visit("grad_logvar1", a.grads[1], {optional});
  visit("grad_mean2", a.grads[2], {optional});
  visit("grad_logvar2", a.grads[3], {optional});
}

struct VlbTermsArguments {
  Sizes sizes;
  Output model_output;
  View x_start, x_t;
  const int64_t* t;
  const float* table;      // (T, 8)
  Variance variance;
  bool clip, exact_cdf, detach_mean;
  int levels;
  float* terms;             // (samples,), bits per dimension, or null
  Output grad_model_output; // like model_output, or null
  const float* grad_terms;  // (samples,) that grad_model_output is for; null: for ones
};
template <typename Visit>
void fields(Visit& visit, VlbTermsArguments& a) {
  visit("sizes", a.sizes);
  visit("model_output", a.model_output);
  visit("x_t", a.x_t);
  visit("x_start", a.x_start, {required, &a.x_t});
  visit("t", a.t);
  visit("table", a.table);
  visit("variance", a.variance);
  visit("clip", a.clip);
  visit("levels", a.levels);
  visit("exact_cdf", a.exact_cdf);
  visit("detach_mean", a.detach_mean);
  visit("terms", a.terms, {optional});
  visit("grad_terms", a.grad_terms, {optional});
  visit("grad_model_output", a.grad_model_output, {optional, &a.model_output.view});
}

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
  float* workspace;               // CUDA: as many floats as the plan says
  int threads;
};
template <typename Visit>
void fields(Visit& visit, GroupNormArguments& a) {
  visit("channels_last", a.channels_last);
  visit("samples", a.samples);
  visit("channels", a.channels);
  visit("pixels", a.pixels);
  visit("groups", a.groups);
  visit("eps", a.eps);
  visit("silu", a.silu);
  visit("dropout", a.dropout);
  visit("x", a.x, {required, nullptr, a.channels_last});
  visit("weight", a.weight, {optional});
  visit("bias", a.bias, {optional});
  visit("pre_bias", a.pre_bias, {optional});
  visit("scale", a.scale, {optional});
  visit("shift", a.shift, {optional});
  visit("y", a.y, {in_first, &a.x, a.channels_last});
  visit("mean", a.mean);
  visit("rstd", a.rstd);
  visit("grad_y", a.grad_y, {in_second, &a.x, a.channels_last});
  visit("grad_x", a.grad_x, {optional_in_second, &a.x, a.channels_last});
  visit("grad_weight", a.grad_weight, {optional_in_second, &a.weight});
  visit("grad_bias", a.grad_bias, {optional_in_second, &a.bias});
  visit("grad_pre_bias", a.grad_pre_bias, {optional_in_second, &a.pre_bias.view});
  visit("grad_scale", a.grad_scale, {optional_in_second, &a.scale.view});
  visit("grad_shift", a.grad_shift, {optional_in_second, &a.shift.view});
  visit("workspace", a.workspace, {optional});
  visit.threads("threads", a.threads);
}

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
template <typename Visit>
void fields(Visit& visit, Conv3x3Arguments& a) {
  visit("samples", a.samples);
  visit("height", a.height);
  visit("width", a.width);
  visit("channels_in", a.channels_in);
  visit("channels_out", a.channels_out);
  visit("x", a.x, {required, nullptr, true});
  visit("weight", a.weight);
  visit("bias", a.bias, {optional});
  visit("residual", a.residual, {optional, nullptr, true});
  visit("y", a.y, {required, nullptr, true});
  visit.threads("threads", a.threads);
}

// (channels_out, channels_in, 3, 3) of any strides.
struct Filters {
  const float* data;
  int64_t strides[4];
};

struct Conv3x3WeightArguments {
  Filters weight;
  int64_t channels_in, channels_out;
  float* transformed;     // (panels, 16, channels_in, conv3x3_panel)
  int threads;
};
template <typename Visit>
void fields(Visit& visit, Conv3x3WeightArguments& a) {
  visit("channels_in", a.channels_in);
  visit("channels_out", a.channels_out);
  visit("weight", a.weight);
  visit("transformed", a.transformed);
  visit.threads("threads", a.threads);
}

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
template <typename Visit>
void fields(Visit& visit, AttentionArguments& a) {
  visit("samples", a.samples);
  visit("tokens", a.tokens);
  visit("heads", a.heads);
  visit("head_channels", a.head_channels);
  visit("scale", a.scale);
  visit("qkv", a.qkv);
  visit("out", a.out, {required, &a.qkv});
  visit("logsumexp", a.logsumexp, {{Need::optional, Need::required}});
  visit("grad_out", a.grad_out, {in_second, &a.qkv});
  visit("grad_qkv", a.grad_qkv, {in_second, &a.qkv});
  visit("workspace", a.workspace, {in_second});
}

}  // namespace ddpm_fast
