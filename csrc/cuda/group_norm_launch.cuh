// What group_norm's launchers, forward and backward, do alike.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "group_norm.h"
#include "launch.h"

namespace ddpm_fast::cuda {

inline bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

// Makes the plan for the device, and calls launch(plan, one of its launches) for each.
template <typename MakePlan, typename Launch>
const char* launch_group_norm(const GroupNormArguments& a, int device, const MakePlan& make_plan, const Launch& launch) {
  if (a.samples == 0 || a.channels == 0 || a.pixels == 0) return nullptr;
  if (a.pixels > group_norm_most_pixels || a.channels > group_norm_most_channels) return "more than 2^30 pixels or channels";
  return launch_on(device, [&] {
    int multiprocessors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const GroupNormSizes sizes{a.samples, a.channels, a.pixels, a.groups, a.channels_last, a.x.dtype};
    const GroupNormPlan plan = make_plan(sizes, multiprocessors);
    for (const GroupNormLaunch& at : plan.launches)
      if (error == cudaSuccess) error = launch(plan, at);
    return error;
  });
}

// Starts the kernel that kernel_of(a value of the data's type, layout as a type) gives, which takes the arguments and its tile.
template <typename KernelOf>
cudaError_t launch_slabs(const GroupNormArguments& a, const GroupNormLaunch& at, void* stream, const KernelOf& kernel_of) {
  return launch_for(a.x.dtype, [&](auto t) {
    const dim3 grid(at.grid[0], at.grid[1], at.grid[2]), block(at.block[0], at.block[1]);
    const auto kernel = a.channels_last ? kernel_of(t, std::true_type()) : kernel_of(t, std::false_type());
    kernel<<<grid, block, at.shared, static_cast<cudaStream_t>(stream)>>>(a, at.tile);
    return cudaGetLastError();
  });
}

}  // namespace ddpm_fast::cuda
