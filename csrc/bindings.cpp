// The only file that knows Python. Tensors arrive as addresses, sizes and a dtype tag; shapes, devices and dtypes were
// checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#if defined(DDPM_FAST_CUDA)
#include <cuda_runtime_api.h>
#include "cuda/group_norm.h"
#include "cuda/attention.h"
#include "cuda/randn.h"
#endif

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Index of the first t outside [0, steps), or -1.
int64_t first_out_of_range(uintptr_t t, int64_t count, int64_t steps) {
  const int64_t* values = pointer<const int64_t>(t);
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= steps) return i;
  return -1;
}

// Of a tensor that must be there. 0 is also what PyTorch gives for one whose memory was freed, or that never had any.
uintptr_t given(uintptr_t address) {
  if (!address)
    throw std::invalid_argument("a tensor has no memory to read: its storage was freed, or it stands for values without holding them");
  return address;
}

View view(uintptr_t address, int dtype) { return {pointer<void>(address), DType(dtype)}; }
const float* floats(uintptr_t address) { return pointer<const float>(address); }
const int64_t* steps(uintptr_t address) { return pointer<const int64_t>(address); }

// (address of its tensor or 0, whether there is noise, seed, stream, first sample)
using Noise = std::tuple<uintptr_t, bool, uint64_t, uint32_t, uint64_t>;
NoiseSource source(const Noise& noise, int dtype) {
  const auto [tensor, present, seed, stream, first_sample] = noise;
  return {view(tensor, dtype), {seed, stream, first_sample}, present};
}

void cpu_randn(uintptr_t out, int dtype, int64_t samples, int64_t elements, int threads, uint64_t seed, uint32_t stream,
               uint64_t first_sample) {
  cpu::kernels().randn({view(out, dtype), {samples, elements, threads}, {seed, stream, first_sample}});
}

void cpu_q_sample(uintptr_t x_start, uintptr_t out, int dtype, uintptr_t t, uintptr_t signal, uintptr_t sigma, const Noise& noise,
                  int64_t samples, int64_t elements, int threads) {
  cpu::kernels().q_sample({view(given(x_start), dtype), view(given(out), dtype), elements, steps(given(t)), floats(given(signal)),
                           floats(given(sigma)), source(noise, dtype), {samples, elements, threads}});
}

// out = factors[t] x, or where t is 0 factors[n] x of sample n: q_sample without its second term.
void cpu_scale(uintptr_t x, uintptr_t out, int dtype, int64_t stride, uintptr_t t, uintptr_t factors, int64_t samples, int64_t elements,
               int threads) {
  cpu::kernels().q_sample({view(given(x), dtype), view(out, dtype), stride, steps(t), floats(given(factors)), nullptr, {},
                           {samples, elements, threads}});
}

// Any of loss and grad_out may be 0, which leaves it out; grad_loss 0 stands for ones.
void cpu_simple_loss(uintptr_t out, int out_dtype, int64_t stride, uintptr_t x_start, int dtype, uintptr_t t, uintptr_t weight,
                     uintptr_t x_start_coef, uintptr_t noise_coef, const Noise& noise, uintptr_t loss, uintptr_t grad_loss,
                     uintptr_t grad_out, int64_t samples, int64_t elements, int threads) {
  cpu::kernels().simple_loss({{view(given(out), out_dtype), stride}, view(given(x_start), dtype), steps(given(t)), floats(given(weight)),
                              floats(given(x_start_coef)), floats(given(noise_coef)), source(noise, dtype), pointer<float>(loss),
                              {view(grad_out, out_dtype), stride}, floats(grad_loss), {samples, elements, threads}});
}

PStepArguments p_step_arguments(uintptr_t x_t, int dtype, uintptr_t out, uintptr_t without, int out_dtype, int64_t stride,
                                float guidance, uintptr_t previous, uintptr_t t, uintptr_t table, const Noise& noise, int variance,
                                bool clip, int64_t samples, int64_t elements, int threads) {
  PStepArguments a{};
  a.x_t = view(given(x_t), dtype);
  a.out = {view(given(out), out_dtype), stride};
  a.without = {view(without, out_dtype), stride};
  a.guidance = guidance;
  a.previous = view(previous, dtype);
  a.t = steps(given(t));
  a.table = floats(given(table));
  a.noise = source(noise, dtype);
  a.variance = Variance(variance);
  a.clip = clip;
  a.sizes = {samples, elements, threads};
  return a;
}

void cpu_p_step(uintptr_t x_t, int dtype, uintptr_t out, uintptr_t without, int out_dtype, int64_t stride, float guidance,
                uintptr_t previous, uintptr_t t, uintptr_t table, const Noise& noise, int variance, bool clip, int64_t samples,
                int64_t elements, int threads, uintptr_t x_next, uintptr_t x_start) {
  PStepArguments a = p_step_arguments(x_t, dtype, out, without, out_dtype, stride, guidance, previous, t, table, noise, variance,
                                      clip, samples, elements, threads);
  a.x_next = view(x_next, dtype);
  a.x_start = view(x_start, dtype);
  cpu::kernels().p_step(a);
}

void cpu_p_step_backward(uintptr_t x_t, int dtype, uintptr_t out, uintptr_t without, int out_dtype, int64_t stride, float guidance,
                         uintptr_t previous, uintptr_t t, uintptr_t table, const Noise& noise, int variance, bool clip,
                         int64_t samples, int64_t elements, int threads, uintptr_t grad_next, uintptr_t grad_start,
                         uintptr_t grad_x_t, uintptr_t grad_out, uintptr_t grad_without, uintptr_t grad_previous,
                         uintptr_t grad_noise) {
  PStepArguments a = p_step_arguments(x_t, dtype, out, without, out_dtype, stride, guidance, previous, t, table, noise, variance,
                                      clip, samples, elements, threads);
  a.grad_next = view(grad_next, dtype);
  a.grad_start = view(grad_start, dtype);
  a.grad_x_t = view(grad_x_t, dtype);
  a.grad_out = {view(grad_out, out_dtype), stride};
  a.grad_without = {view(grad_without, out_dtype), stride};
  a.grad_previous = view(grad_previous, dtype);
  a.grad_noise = view(grad_noise, dtype);
  cpu::kernels().p_step_backward(a);
}

// (address, sample stride, element stride)
using Operand = std::tuple<uintptr_t, int64_t, int64_t>;
Broadcast broadcast(const Operand& operand, int dtype) {
  const auto [address, sample_stride, element_stride] = operand;
  return {view(given(address), dtype), sample_stride, element_stride};
}

// As cpu_simple_loss; grads has (address or 0, dtype) for each operand.
void cpu_gaussian_kl(const Operand& mean1, const Operand& logvar1, const Operand& mean2, const Operand& logvar2, int dtype, uintptr_t kl,
                     uintptr_t grad_kl, const std::array<std::pair<uintptr_t, int>, 4>& grads, bool reduced, int64_t samples,
                     int64_t elements, int threads) {
  GaussianKLArguments a{broadcast(mean1, dtype), broadcast(logvar1, dtype), broadcast(mean2, dtype), broadcast(logvar2, dtype),
                        view(kl, dtype), view(grad_kl, dtype), {}, reduced, {samples, elements, threads}};
  for (size_t k = 0; k < grads.size(); ++k) a.grads[k] = view(grads[k].first, grads[k].second);
  cpu::kernels().gaussian_kl(a);
}

// As cpu_simple_loss.
void cpu_vlb_terms(uintptr_t out, int out_dtype, int64_t stride, uintptr_t x_start, uintptr_t x_t, int dtype, uintptr_t t,
                   uintptr_t table, int variance, bool clip, int levels, bool exact_cdf, bool detach_mean, uintptr_t terms,
                   uintptr_t grad_terms, uintptr_t grad_out, int64_t samples, int64_t elements, int threads) {
  cpu::kernels().vlb_terms({{view(given(out), out_dtype), stride}, view(given(x_start), dtype), view(given(x_t), dtype), steps(given(t)),
                            floats(given(table)), Variance(variance), clip, exact_cdf, detach_mean, levels, pointer<float>(terms),
                            {view(grad_out, out_dtype), stride}, floats(grad_terms), {samples, elements, threads}});
}

// (address or 0, elements from one sample's row to the next)
using Row = std::pair<uintptr_t, int64_t>;
Rows rows(const Row& row, int dtype) { return {view(row.first, dtype), row.second}; }

// For every backend. Addresses of optional tensors may be 0; dropout (probability, seed, stream, first sample).
using DropoutOf = std::tuple<double, uint64_t, uint32_t, uint64_t>;
GroupNormArguments group_norm_arguments(uintptr_t x, uintptr_t y, int dtype, bool channels_last, int64_t samples, int64_t channels,
                                        int64_t pixels, int64_t groups, float eps, bool silu, uintptr_t weight, uintptr_t bias,
                                        int parameter_dtype, const Row& pre_bias, const Row& scale, const Row& shift, int rows_dtype,
                                        const DropoutOf& dropout, uintptr_t mean, uintptr_t rstd, uintptr_t workspace, int threads) {
  GroupNormArguments a{};
  a.x = view(given(x), dtype);
  a.y = view(y, dtype);
  a.channels_last = channels_last;
  a.samples = samples, a.channels = channels, a.pixels = pixels, a.groups = groups;
  a.eps = eps;
  a.silu = silu;
  a.weight = view(weight, parameter_dtype);
  a.bias = view(bias, parameter_dtype);
  a.pre_bias = rows(pre_bias, rows_dtype);
  a.scale = rows(scale, rows_dtype);
  a.shift = rows(shift, rows_dtype);
  const auto [probability, seed, stream, first_sample] = dropout;
  a.dropout = {uint32_t(probability * 0x1p32), float(1.0 / (1.0 - probability)), {seed, stream, first_sample}};
  a.mean = pointer<float>(mean);
  a.rstd = pointer<float>(rstd);
  a.workspace = pointer<float>(workspace);
  a.threads = threads;
  return a;
}

void add_group_norm_gradients(GroupNormArguments& a, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias,
                              const Row& grad_pre_bias, const Row& grad_scale, const Row& grad_shift, int parameter_dtype, int rows_dtype) {
  a.grad_y = view(grad_y, int(a.x.dtype));
  a.grad_x = view(grad_x, int(a.x.dtype));
  a.grad_weight = view(grad_weight, parameter_dtype);
  a.grad_bias = view(grad_bias, parameter_dtype);
  a.grad_pre_bias = rows(grad_pre_bias, rows_dtype);
  a.grad_scale = rows(grad_scale, rows_dtype);
  a.grad_shift = rows(grad_shift, rows_dtype);
}

void cpu_group_norm(uintptr_t x, uintptr_t y, int dtype, bool channels_last, int64_t samples, int64_t channels, int64_t pixels,
                    int64_t groups, float eps, bool silu, uintptr_t weight, uintptr_t bias, int parameter_dtype, const Row& pre_bias,
                    const Row& scale, const Row& shift, int rows_dtype, const DropoutOf& dropout, uintptr_t mean, uintptr_t rstd,
                    int threads) {
  cpu::kernels().group_norm(group_norm_arguments(x, y, dtype, channels_last, samples, channels, pixels, groups, eps, silu, weight, bias,
                                                 parameter_dtype, pre_bias, scale, shift, rows_dtype, dropout, mean, rstd, 0, threads));
}

// Any of the gradients may be 0, which leaves it out.
void cpu_group_norm_backward(uintptr_t x, int dtype, bool channels_last, int64_t samples, int64_t channels, int64_t pixels,
                             int64_t groups, float eps, bool silu, uintptr_t weight, uintptr_t bias, int parameter_dtype,
                             const Row& pre_bias, const Row& scale, const Row& shift, int rows_dtype, const DropoutOf& dropout,
                             uintptr_t mean, uintptr_t rstd, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_weight,
                             uintptr_t grad_bias, const Row& grad_pre_bias, const Row& grad_scale, const Row& grad_shift, int threads) {
  GroupNormArguments a =
      group_norm_arguments(x, 0, dtype, channels_last, samples, channels, pixels, groups, eps, silu, weight, bias, parameter_dtype,
                           pre_bias, scale, shift, rows_dtype, dropout, mean, rstd, 0, threads);
  add_group_norm_gradients(a, grad_y, grad_x, grad_weight, grad_bias, grad_pre_bias, grad_scale, grad_shift, parameter_dtype, rows_dtype);
  cpu::kernels().group_norm_backward(a);
}

// A weight of any strides to U, of cpu_conv3x3_floats values.
void cpu_conv3x3_weight(uintptr_t weight, const std::array<int64_t, 4>& strides, int64_t channels_in, int64_t channels_out,
                        uintptr_t transformed, int threads) {
  cpu::kernels().conv3x3_weight({floats(weight), {strides[0], strides[1], strides[2], strides[3]}, channels_in, channels_out,
                                 pointer<float>(transformed), threads});
}
int64_t cpu_conv3x3_floats(int64_t channels_in, int64_t channels_out) {
  return (channels_out + conv3x3_panel - 1) / conv3x3_panel * conv3x3_panel * 16 * channels_in;
}

// Addresses of bias and residual may be 0.
void cpu_conv3x3(uintptr_t x, uintptr_t transformed, uintptr_t bias, uintptr_t residual, uintptr_t y, int64_t samples, int64_t height,
                 int64_t width, int64_t channels_in, int64_t channels_out, int threads) {
  cpu::kernels().conv3x3({floats(x), floats(transformed), floats(bias), floats(residual), pointer<float>(y), samples, height, width,
                          channels_in, channels_out, threads});
}

#if defined(DDPM_FAST_CUDA)
void cuda_randn(uintptr_t out, int64_t samples, int64_t elements, int dtype, uint64_t seed, uint32_t stream,
                uint64_t first_sample, int device, uintptr_t cuda_stream) {
  const char* error =
      cuda::randn({view(out, dtype), {samples, elements, 0}, {seed, stream, first_sample}}, device, pointer<void>(cuda_stream));
  if (error)
    throw std::runtime_error("randn: CUDA launch failed for " + std::to_string(samples) + " samples of " +
                             std::to_string(elements) + " elements: " + error);
}

py::dict cuda_randn_plan(int64_t samples, int64_t elements) {
  const cuda::RandnPlan plan = cuda::randn_plan(samples, elements);
  py::dict d;
  d["grid"] = py::make_tuple(plan.grid_x, plan.grid_y, 1);
  d["block"] = plan.block;
  return d;
}

void require_launched(const char* op, const GroupNormArguments& a, const char* error) {
  if (error)
    throw std::runtime_error(std::string(op) + ": CUDA launch failed for " + std::to_string(a.samples) + " samples of " +
                             std::to_string(a.channels) + " channels of " + std::to_string(a.pixels) + " pixels in " +
                             std::to_string(a.groups) + " groups: " + error);
}

void cuda_group_norm(uintptr_t x, uintptr_t y, int dtype, bool channels_last, int64_t samples, int64_t channels, int64_t pixels,
                     int64_t groups, float eps, bool silu, uintptr_t weight, uintptr_t bias, int parameter_dtype, const Row& pre_bias,
                     const Row& scale, const Row& shift, int rows_dtype, const DropoutOf& dropout, uintptr_t mean, uintptr_t rstd,
                     uintptr_t workspace, int device, uintptr_t cuda_stream) {
  const GroupNormArguments a =
      group_norm_arguments(x, y, dtype, channels_last, samples, channels, pixels, groups, eps, silu, weight, bias, parameter_dtype,
                           pre_bias, scale, shift, rows_dtype, dropout, mean, rstd, workspace, 0);
  require_launched("group_norm", a, cuda::group_norm(a, device, pointer<void>(cuda_stream)));
}

void cuda_group_norm_backward(uintptr_t x, int dtype, bool channels_last, int64_t samples, int64_t channels, int64_t pixels,
                              int64_t groups, float eps, bool silu, uintptr_t weight, uintptr_t bias, int parameter_dtype,
                              const Row& pre_bias, const Row& scale, const Row& shift, int rows_dtype, const DropoutOf& dropout,
                              uintptr_t mean, uintptr_t rstd, uintptr_t workspace, uintptr_t grad_y, uintptr_t grad_x,
                              uintptr_t grad_weight, uintptr_t grad_bias, const Row& grad_pre_bias, const Row& grad_scale,
                              const Row& grad_shift, int device, uintptr_t cuda_stream) {
  GroupNormArguments a =
      group_norm_arguments(x, 0, dtype, channels_last, samples, channels, pixels, groups, eps, silu, weight, bias, parameter_dtype,
                           pre_bias, scale, shift, rows_dtype, dropout, mean, rstd, workspace, 0);
  add_group_norm_gradients(a, grad_y, grad_x, grad_weight, grad_bias, grad_pre_bias, grad_scale, grad_shift, parameter_dtype, rows_dtype);
  require_launched("group_norm_backward", a, cuda::group_norm_backward(a, device, pointer<void>(cuda_stream)));
}

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

[[noreturn]] void attention_failed(const char* op, const AttentionArguments& a, const char* error) {
  throw std::runtime_error(std::string(op) + ": CUDA launch failed for " + std::to_string(a.samples) + " samples of " +
                           std::to_string(a.tokens) + " tokens, " + std::to_string(a.heads) + " heads of " +
                           std::to_string(a.head_channels) + " channels: " + error);
}

// logsumexp may be 0, which leaves it out.
void cuda_attention(uintptr_t qkv, uintptr_t out, int dtype, uintptr_t logsumexp, int64_t samples, int64_t tokens, int64_t heads,
                    int64_t head_channels, float scale, int device, uintptr_t cuda_stream) {
  const AttentionArguments a{view(qkv, dtype), view(out, dtype), pointer<float>(logsumexp), samples, tokens, heads, head_channels, scale,
                             {}, {}, nullptr};
  if (const char* error = cuda::attention(a, device, pointer<void>(cuda_stream))) attention_failed("attention", a, error);
}

void cuda_attention_backward(uintptr_t qkv, uintptr_t out, uintptr_t grad_out, uintptr_t grad_qkv, int dtype, uintptr_t logsumexp,
                             int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, float scale,
                             uintptr_t workspace, int device, uintptr_t cuda_stream) {
  const AttentionArguments a{view(qkv, dtype), view(out, dtype), pointer<float>(logsumexp), samples, tokens, heads, head_channels, scale,
                             view(grad_out, dtype), view(grad_qkv, dtype), pointer<float>(workspace)};
  if (const char* error = cuda::attention_backward(a, device, pointer<void>(cuda_stream))) attention_failed("attention_backward", a, error);
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
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = DDPM_FAST_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitizer"] = "address";
#elif defined(__SANITIZE_THREAD__)
  info["sanitizer"] = "thread";
#else
  info["sanitizer"] = py::none();
#endif
  const char* names[3];
  const int count = cpu::available_isas(names);
  info["isas"] = std::vector<std::string>(names, names + count);
#if defined(DDPM_FAST_CUDA)
  info["cuda"] = CUDART_VERSION;
  info["cuda_architectures"] = DDPM_FAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_missing"] = DDPM_FAST_CUDA_MISSING;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of ddpm_fast. Takes addresses; use ddpm_fast.ops instead.";
  m.def("build_info", &build_info, "How this module was built and which instruction sets this processor offers it.");
  m.def("isa", [] { return cpu::kernels().isa; }, "The instruction set in use.");
  m.def("select_isa", [](const char* isa) {
    if (!cpu::select_isa(isa)) throw py::value_error(std::string("this processor does not run the ") + isa + " build");
  }, py::arg("isa").none(true), "For tests: use this build of the CPU kernels; None goes back to the best.");
  m.def("first_out_of_range", &first_out_of_range);
  m.def("cpu_randn", &cpu_randn, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_q_sample", &cpu_q_sample, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_scale", &cpu_scale, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_simple_loss", &cpu_simple_loss, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_p_step", &cpu_p_step, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_p_step_backward", &cpu_p_step_backward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_gaussian_kl", &cpu_gaussian_kl, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_vlb_terms", &cpu_vlb_terms, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_group_norm", &cpu_group_norm, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_group_norm_backward", &cpu_group_norm_backward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_conv3x3", &cpu_conv3x3, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_conv3x3_weight", &cpu_conv3x3_weight, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_conv3x3_floats", &cpu_conv3x3_floats, py::arg("channels_in"), py::arg("channels_out"));
#if defined(DDPM_FAST_CUDA)
  m.def("cuda_randn", &cuda_randn, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_randn_plan", &cuda_randn_plan, py::arg("samples"), py::arg("elements"));
  m.def("cuda_group_norm", &cuda_group_norm, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_group_norm_backward", &cuda_group_norm_backward, py::call_guard<py::gil_scoped_release>());
  const auto group_norm_plan = [&m](const char* name, auto plan) {
    m.def(name, plan, py::arg("samples"), py::arg("channels"), py::arg("pixels"), py::arg("groups"), py::arg("channels_last"),
          py::arg("dtype"), py::kw_only(), py::arg("sms"), py::arg("aligned") = true);
  };
  group_norm_plan("cuda_group_norm_plan", &cuda_group_norm_plan);
  group_norm_plan("cuda_group_norm_backward_plan", &cuda_group_norm_backward_plan);
  m.def("cuda_attention", &cuda_attention, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_attention_backward", &cuda_attention_backward, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_attention_plan", &cuda_attention_plan, py::arg("samples"), py::arg("tokens"), py::arg("heads"), py::arg("head_channels"),
        py::arg("dtype"));
  m.def("cuda_attention_backward_plan", &cuda_attention_backward_plan, py::arg("samples"), py::arg("tokens"), py::arg("heads"),
        py::arg("head_channels"), py::arg("dtype"));
#endif
}
