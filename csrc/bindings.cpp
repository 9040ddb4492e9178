// The only file that knows Python. Tensors arrive as addresses, sizes and a dtype tag; shapes, devices and dtypes were
// checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#if defined(DDPM_FAST_CUDA)
#include <cuda_runtime_api.h>
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

void cpu_randn(uintptr_t out, int64_t samples, int64_t elements, int dtype, uint64_t seed, uint32_t stream,
               uint64_t first_sample, int threads) {
  cpu::kernels().randn({pointer<void>(out), samples, elements, DType(dtype), {seed, stream, first_sample}, threads});
}

void cpu_q_sample(uintptr_t x_start, uintptr_t noise, uintptr_t out, uintptr_t t, uintptr_t signal, uintptr_t sigma,
                  int64_t samples, int64_t elements, int dtype, int source, uint64_t seed, uint32_t stream,
                  uint64_t first_sample, int threads) {
  cpu::kernels().q_sample({pointer<const void>(x_start), pointer<const void>(noise), pointer<void>(out),
                           pointer<const int64_t>(t), pointer<const float>(signal), pointer<const float>(sigma), samples,
                           elements, DType(dtype), NoiseSource(source), {seed, stream, first_sample}, threads});
}

#if defined(DDPM_FAST_CUDA)
void cuda_randn(uintptr_t out, int64_t samples, int64_t elements, int dtype, uint64_t seed, uint32_t stream,
                uint64_t first_sample, int device, uintptr_t cuda_stream) {
  const char* error = cuda::randn({pointer<void>(out), samples, elements, DType(dtype), {seed, stream, first_sample}, 0},
                                  device, pointer<void>(cuda_stream));
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
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = DDPM_FAST_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
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
#if defined(DDPM_FAST_CUDA)
  m.def("cuda_randn", &cuda_randn, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_randn_plan", &cuda_randn_plan, py::arg("samples"), py::arg("elements"));
#endif
}
