// The launch plans of CUDA's kernels as Python's dictionaries, for their workspaces and for tests.
#include "plans.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/group_norm.h"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

// "kernel" is its name as a demangler writes it, "tile" the second argument of those that take one, as it lies in memory.
py::dict group_norm_plan_dict(const cuda::GroupNormPlan& plan, const std::string& op, bool channels_last, DType dtype) {
  const char* const type = std::array<const char*, 3>{"float", "__nv_bfloat16", "__half"}[size_t(dtype)];
  const std::string slabs = op + "_kernel<" + type + (channels_last ? ", true, " : ", false, ") + std::to_string(plan.vector) + ", " +
                            std::to_string(plan.items) + ">";
  py::list launches;
  for (const cuda::GroupNormLaunch& launch : plan.launches) {
    py::dict d;
    d["kernel"] = std::array<std::string, 3>{slabs, op + "_finish_kernel", op + "_parameters_kernel"}[size_t(launch.kernel)];
    d["phase"] = std::array<const char*, 3>{"whole", "sums", "results"}[size_t(launch.tile.phase)];
    d["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
    d["block"] = py::make_tuple(launch.block[0], launch.block[1]);
    d["shared"] = launch.shared;
    d["tile"] = launch.kernel == cuda::GroupNormKernel::parameters
                    ? py::bytes()
                    : py::bytes(reinterpret_cast<const char*>(&launch.tile), sizeof launch.tile);
    d["groups"] = launch.tile.groups;
    d["channels"] = launch.tile.channels;
    d["positions"] = launch.tile.positions;
    d["tiles"] = py::make_tuple(launch.tile.channel_tiles, launch.tile.position_tiles);
    launches.append(d);
  }
  py::dict d;
  d["vector"] = plan.vector;
  d["items"] = plan.items;
  d["launches"] = launches;
  d["workspace"] = plan.workspace;
  return d;
}

py::dict cuda_group_norm_plan(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, bool channels_last, int dtype, int sms,
                              bool aligned) {
  const cuda::GroupNormSizes sizes{samples, channels, pixels, groups, channels_last, DType(dtype)};
  return group_norm_plan_dict(cuda::group_norm_plan(sizes, sms, aligned), "group_norm", channels_last, DType(dtype));
}

py::dict cuda_group_norm_backward_plan(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, bool channels_last, int dtype,
                                       int sms, bool aligned) {
  const cuda::GroupNormSizes sizes{samples, channels, pixels, groups, channels_last, DType(dtype)};
  return group_norm_plan_dict(cuda::group_norm_backward_plan(sizes, sms, aligned), "group_norm_backward", channels_last, DType(dtype));
}

// One launch: the kernel's name with its template arguments, as a demangler writes it, and its configuration.
py::dict attention_launch(const cuda::AttentionLaunch& launch, int dtype) {
  static const char* const names[] = {"float", "__nv_bfloat16", "__half"};
  std::string kernel = std::string(launch.kernel) + "<" + names[dtype];
  if (launch.padded_channels) kernel += ", " + std::to_string(launch.padded_channels);
  if (launch.gradient) kernel += ", " + std::to_string(launch.gradient);
  py::dict d;
  d["kernel"] = kernel + ">";
  d["grid"] = py::make_tuple(launch.blocks, 1, 1);
  d["block"] = launch.threads;
  d["shared_bytes"] = launch.shared_bytes;
  return d;
}

py::dict cuda_attention_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, int dtype) {
  py::dict d;
  const cuda::AttentionLaunch launch = cuda::attention_plan(samples, tokens, heads, head_channels, DType(dtype));
  d["launches"] = std::vector<py::dict>{attention_launch(launch, dtype)};
  d["workspace"] = 0;
  return d;
}

py::dict cuda_attention_backward_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, int dtype) {
  const cuda::AttentionBackwardPlan plan = cuda::attention_backward_plan(samples, tokens, heads, head_channels, DType(dtype));
  std::vector<py::dict> launches;
  for (int i = 0; i < plan.count; ++i) launches.push_back(attention_launch(plan.launches[size_t(i)], dtype));
  py::dict d;
  d["launches"] = launches;
  d["workspace"] = plan.workspace;
  return d;
}
}  // namespace

void ddpm_fast::add_plans(py::module_& m) {
  const auto group_norm_plan = [&m](const char* name, auto plan) {
    m.def(name, plan, py::arg("samples"), py::arg("channels"), py::arg("pixels"), py::arg("groups"), py::arg("channels_last"),
          py::arg("dtype"), py::kw_only(), py::arg("sms"), py::arg("aligned") = true);
  };
  group_norm_plan("cuda_group_norm_plan", &cuda_group_norm_plan);
  group_norm_plan("cuda_group_norm_backward_plan", &cuda_group_norm_backward_plan);
  const auto attention_plan = [&m](const char* name, auto plan) {
    m.def(name, plan, py::arg("samples"), py::arg("tokens"), py::arg("heads"), py::arg("head_channels"), py::arg("dtype"));
  };
  attention_plan("cuda_attention_plan", &cuda_attention_plan);
  attention_plan("cuda_attention_backward_plan", &cuda_attention_backward_plan);
}
