// group_norm, forward: launcher. The kernel is in group_norm.cuh, the plan in group_norm_plan.cpp.
#include <cuda_runtime.h>

#include "group_norm.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

template <typename T, bool channels_last>
void launch(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  constexpr int vector = 16 / sizeof(T), few = group_norm_few_items, many = group_norm_many_items;
  const auto kernel = plan.vector == 1     ? group_norm_kernel<T, channels_last, 1, many>
                      : plan.items == many ? group_norm_kernel<T, channels_last, vector, many>
                                           : group_norm_kernel<T, channels_last, vector, few>;
  kernel<<<dim3(at.grid[0], at.grid[1], at.grid[2]), dim3(at.block[0], at.block[1]), at.shared, stream>>>(a, at.tile);
}

template <typename T> void launch(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  if (a.channels_last) launch<T, true>(a, plan, at, stream);
  else launch<T, false>(a, plan, at, stream);
}

bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

}  // namespace

const char* group_norm(const GroupNormArguments& a, int device, void* stream) {
  if (a.samples == 0 || a.channels == 0 || a.pixels == 0) return nullptr;
  if (a.pixels > group_norm_most_pixels || a.channels > group_norm_most_channels) return "more than 2^30 pixels or channels";
  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  int multiprocessors = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const GroupNormPlan plan = group_norm_plan({a.samples, a.channels, a.pixels, a.groups, a.channels_last, a.x.dtype}, multiprocessors,
                                             aligned(a.x) && aligned(a.y));
  for (const GroupNormLaunch& at : plan.launches) {
    switch (a.x.dtype) {
      case DType::float32: launch<float>(a, plan, at, static_cast<cudaStream_t>(stream)); break;
      case DType::bfloat16: launch<__nv_bfloat16>(a, plan, at, static_cast<cudaStream_t>(stream)); break;
      case DType::float16: launch<__half>(a, plan, at, static_cast<cudaStream_t>(stream)); break;
    }
    error = cudaGetLastError();
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace ddpm_fast::cuda
