// What the bindings hand to a kernel: plain structs of pointers and sizes, no Python, no libtorch.
#pragma once
#include "dtype.h"

namespace ddpm_fast {

struct RandnArguments {
  void* out;            // (samples, elements), dtype
  int64_t samples;
  int64_t elements;     // of one sample
  DType dtype;
  NoiseKey key;
  int threads;
};

enum class NoiseSource : int { none = 0, tensor = 1, generated = 2 };

struct QSampleArguments {
  const void* x_start;  // (samples, elements), dtype
  const void* noise;    // the same, or null unless source is tensor
  void* out;            // the same
  const int64_t* t;     // (samples,), each in [0, T): checked by the caller
  const float* signal;  // (T,)
  const float* sigma;   // (T,), or null where source is none
  int64_t samples;
  int64_t elements;
  DType dtype;
  NoiseSource source;
  NoiseKey key;
  int threads;
};

}  // namespace ddpm_fast
