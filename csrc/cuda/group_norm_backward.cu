// group_norm, backward: launcher. The kernels are in group_norm_backward.cuh, the plan in group_norm_plan.cpp.
#include "group_norm_backward.cuh"
#include "group_norm_launch.cuh"

namespace ddpm_fast::cuda {

const char* group_norm_backward(const GroupNormArguments& a, int device, void* stream) {
  const auto make_plan = [&](const GroupNormSizes& sizes, int multiprocessors) {
    return group_norm_backward_plan(sizes, multiprocessors, aligned(a.x) && aligned(a.grad_y) && aligned(a.grad_x));
  };
  return launch_group_norm(a, device, make_plan, [&](const GroupNormPlan& plan, const GroupNormLaunch& at) {
    const dim3 grid(at.grid[0], at.grid[1], at.grid[2]), block(at.block[0], at.block[1]);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (at.kernel) {
      case GroupNormKernel::slabs:
        if (at.tile.phase == GroupNormPhase::results && !a.grad_x.data) break;
        return launch_slabs(a, at, stream, [&](auto t, auto layout) {
          using T = decltype(t);
          constexpr bool channels_last = decltype(layout)::value;
          constexpr int vector = 16 / sizeof(T), few = group_norm_few_items, many = group_norm_many_items;
          return plan.vector == 1     ? group_norm_backward_kernel<T, channels_last, 1, many>
                 : plan.items == many ? group_norm_backward_kernel<T, channels_last, vector, many>
                                      : group_norm_backward_kernel<T, channels_last, vector, few>;
        });
      case GroupNormKernel::finish: group_norm_backward_finish_kernel<<<grid, block, at.shared, on>>>(a, at.tile); break;
      case GroupNormKernel::parameters:
        if (a.grad_weight.data || a.grad_bias.data) group_norm_backward_parameters_kernel<<<grid, block, at.shared, on>>>(a);
        break;
    }
    return cudaGetLastError();
  });
}

}  // namespace ddpm_fast::cuda
