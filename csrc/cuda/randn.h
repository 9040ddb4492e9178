// randn on CUDA: launch plan and launcher. The plan is a pure function, so that tests launch what the launcher would.
#pragma once
#include "../common/arguments.h"

namespace ddpm_fast::cuda {

struct RandnPlan {
  uint32_t grid_x;   // runs of threads within a sample
  uint32_t grid_y;   // samples; larger batches loop
  uint32_t block;
};

RandnPlan randn_plan(int64_t samples, int64_t elements);

// Launches on `stream` of `device` and returns null, or the CUDA error's text.
const char* randn(const RandnArguments& arguments, int device, void* stream);

}  // namespace ddpm_fast::cuda
