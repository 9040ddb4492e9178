// group_norm, backward: launcher. The kernels are in group_norm_backward.cuh, the plan in group_norm_plan.cpp.
#include <cuda_runtime.h>

#include "group_norm_backward.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

template <typename T, bool channels_last>
void launch_slabs(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  constexpr int vector = 16 / sizeof(T), few = group_norm_few_items, many = group_norm_many_items;
  const auto kernel = plan.vector == 1     ? group_norm_backward_kernel<T, channels_last, 1, many>
                      : plan.items == many ? group_norm_backward_kernel<T, channels_last, vector, many>
                                           : group_norm_backward_kernel<T, channels_last, vector, few>;
  kernel<<<dim3(at.grid[0], at.grid[1], at.grid[2]), dim3(at.block[0], at.block[1]), at.shared, stream>>>(a, at.tile);
}

template <typename T>
void launch_slabs(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  if (a.channels_last) launch_slabs<T, true>(a, plan, at, stream);
  else launch_slabs<T, false>(a, plan, at, stream);
}

void launch_slabs(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  switch (a.x.dtype) {
    case DType::float32: launch_slabs<float>(a, plan, at, stream); break;
    case DType::bfloat16: launch_slabs<__nv_bfloat16>(a, plan, at, stream); break;
    case DType::float16: launch_slabs<__half>(a, plan, at, stream); break;
  }
}

bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

cudaError_t launch(const GroupNormArguments& a, const GroupNormPlan& plan, const GroupNormLaunch& at, cudaStream_t stream) {
  const dim3 grid(at.grid[0], at.grid[1], at.grid[2]), block(at.block[0], at.block[1]);
  switch (at.kernel) {
    case GroupNormKernel::slabs:
      if (at.tile.phase == GroupNormPhase::results && !a.grad_x.data) break;
      launch_slabs(a, plan, at, stream);
      break;
    case GroupNormKernel::finish: group_norm_backward_finish_kernel<<<grid, block, at.shared, stream>>>(a, at.tile); break;
    case GroupNormKernel::parameters:
      if (a.grad_weight.data || a.grad_bias.data) group_norm_backward_parameters_kernel<<<grid, block, at.shared, stream>>>(a);
      break;
  }
  return cudaGetLastError();
}

}  // namespace

const char* group_norm_backward(const GroupNormArguments& a, int device, void* stream) {
  if (a.samples == 0 || a.channels == 0 || a.pixels == 0) return nullptr;
  if (a.pixels > group_norm_most_pixels || a.channels > group_norm_most_channels) return "more than 2^30 pixels or channels";
  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  int multiprocessors = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    const GroupNormPlan plan = group_norm_backward_plan({a.samples, a.channels, a.pixels, a.groups, a.channels_last, a.x.dtype},
                                                        multiprocessors, aligned(a.x) && aligned(a.grad_y) && aligned(a.grad_x));
    for (const GroupNormLaunch& at : plan.launches)
      if (error == cudaSuccess) error = launch(a, plan, at, static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ddpm_fast::cuda
