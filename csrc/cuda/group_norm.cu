// group_norm, forward: launcher. The kernel is in group_norm.cuh, the plan in group_norm_plan.cpp.
#include "group_norm.cuh"
#include "group_norm_launch.cuh"

namespace ddpm_fast::cuda {

const char* group_norm(const GroupNormArguments& a, int device, void* stream) {
  const auto make_plan = [&](const GroupNormSizes& sizes, int multiprocessors) {
    return group_norm_plan(sizes, multiprocessors, aligned(a.x) && aligned(a.y));
  };
  return launch_group_norm(a, device, make_plan, [&](const GroupNormPlan& plan, const GroupNormLaunch& at) {
    return launch_slabs(a, at, stream, [&](auto t, auto layout) {
      using T = decltype(t);
      constexpr bool channels_last = decltype(layout)::value;
      constexpr int vector = 16 / sizeof(T), few = group_norm_few_items, many = group_norm_many_items;
      return plan.vector == 1     ? group_norm_kernel<T, channels_last, 1, many>
             : plan.items == many ? group_norm_kernel<T, channels_last, vector, many>
                                  : group_norm_kernel<T, channels_last, vector, few>;
    });
  });
}

}  // namespace ddpm_fast::cuda
