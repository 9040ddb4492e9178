// The module: its kernels, each a function of the fields of its struct (python/kernel.h), and what is asked of it beside.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "python/kernel.h"
#if defined(DDPM_FAST_CUDA)
#include <cuda_runtime_api.h>

#include "cuda/attention.h"
#include "cuda/group_norm.h"
#include "cuda/probe.h"
#include "plans.h"
#endif

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

#define DDPM_RUN(kernel, Arguments) \
  void cpu_##kernel(const char*, const Arguments& a) { cpu::kernels().kernel(a); }
DDPM_KERNELS(DDPM_RUN)
#undef DDPM_RUN

bool is_backward(const std::string& kernel) { return kernel.find("_backward") != std::string::npos; }

void add_cpu_kernels(PyObject* module) {
#define DDPM_ADD(kernel, Arguments) python::add_kernel<Arguments, &cpu_##kernel>(module, "cpu_" #kernel, is_backward(#kernel));
  DDPM_KERNELS(DDPM_ADD)
#undef DDPM_ADD
  python::add_kernel<QSampleArguments, &cpu_q_sample>(module, "cpu_scale", true);  // without the second term
}

// first_out_of_range(t, steps): index of the first value of t, int64 and contiguous, outside [0, steps), or -1.
PyObject* first_out_of_range(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return python::guarded([&] {
    if (count != 2 || !python::is_tensor(given[0]) || !python::has_dtype(given[0], python::Torch::get().int64))
      python::raise(PyExc_TypeError, "first_out_of_range takes a tensor of torch.int64 and a number of steps");
    if (!python::is_contiguous(given[0])) python::raise(PyExc_ValueError, "t must be contiguous");
    const int64_t* const t = static_cast<const int64_t*>(python::address(given[0]));
    const int64_t last = python::numel(given[0]), steps = python::to_int64(given[1]);
    int64_t i = 0;
    while (i < last && t[i] >= 0 && t[i] < steps) ++i;
    return PyLong_FromLongLong(i < last ? i : -1);
  });
}
PyMethodDef first_out_of_range_method{"first_out_of_range",
                                      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&first_out_of_range)), METH_FASTCALL,
                                      "Index of the first value of t outside 0..steps - 1, or -1."};

// noise_words(words, seed, stream, first_sample): into words, int64 and contiguous, the first word of each sample's first block.
PyObject* noise_words(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return python::guarded([&] {
    if (count != 4 || !python::is_tensor(given[0]) || !python::has_dtype(given[0], python::Torch::get().int64))
      python::raise(PyExc_TypeError, "noise_words takes a tensor of torch.int64, a seed, a stream and a first sample");
    if (!python::is_contiguous(given[0])) python::raise(PyExc_ValueError, "words must be contiguous");
    int64_t* const words = static_cast<int64_t*>(python::address(given[0]));
    const int64_t samples = python::numel(given[0]);
    const uint64_t seed = python::to_uint64(given[1]), stream = python::to_uint64(given[2]), first_sample = python::to_uint64(given[3]);
    for (int64_t i = 0; i < samples; ++i) {
      const uint64_t sample = first_sample + uint64_t(i);
      uint32_t word = 0, c1 = uint32_t(stream), c2 = uint32_t(sample), c3 = uint32_t(sample >> 32);
      philox4x32_10(word, c1, c2, c3, uint32_t(seed), uint32_t(seed >> 32));
      words[i] = word;
    }
    Py_RETURN_NONE;
  });
}
PyMethodDef noise_words_method{"noise_words", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&noise_words)), METH_FASTCALL,
                               "Writes the first word of each sample's first block."};

int64_t conv3x3_floats(int64_t channels_in, int64_t channels_out) {
  return (channels_out + conv3x3_panel - 1) / conv3x3_panel * conv3x3_panel * 16 * channels_in;
}

#if defined(DDPM_FAST_CUDA)
template <typename Arguments>
struct OnStream {
  Arguments arguments;
  int device;
  void* stream;
};
template <typename Visit, typename Arguments>
void fields(Visit& visit, OnStream<Arguments>& a) {
  fields(visit, a.arguments);
  visit("device", a.device);
  visit("stream", a.stream);
}

std::string sizes(const GroupNormArguments& a) {
  return std::to_string(a.samples) + " samples of " + std::to_string(a.channels) + " channels of " + std::to_string(a.pixels) +
         " pixels in " + std::to_string(a.groups) + " groups";
}
std::string sizes(const AttentionArguments& a) {
  return std::to_string(a.samples) + " samples of " + std::to_string(a.tokens) + " tokens, " + std::to_string(a.heads) + " heads of " +
         std::to_string(a.head_channels) + " channels";
}

template <typename Arguments, auto Launch>
void launch(const char* name, const OnStream<Arguments>& a) {
  const char* const op = name + sizeof "cuda_" - 1;
  if (const char* error = Launch(a.arguments, a.device, a.stream))
    throw std::runtime_error(std::string(op) + ": CUDA launch failed for " + sizes(a.arguments) + ": " + error);
}

template <typename Arguments, auto Launch>
void add_cuda_kernel(PyObject* module, const char* name) {
  python::add_kernel<OnStream<Arguments>, &launch<Arguments, Launch>>(module, name, is_backward(name));
}

void add_cuda_kernels(PyObject* module) {
  add_cuda_kernel<GroupNormArguments, &cuda::group_norm>(module, "cuda_group_norm");
  add_cuda_kernel<GroupNormArguments, &cuda::group_norm_backward>(module, "cuda_group_norm_backward");
  add_cuda_kernel<AttentionArguments, &cuda::attention>(module, "cuda_attention");
  add_cuda_kernel<AttentionArguments, &cuda::attention_backward>(module, "cuda_attention_backward");
}
#endif

// How a kernel's struct lies in memory: the bytes it has, and of each number (name, offset, NumPy's type).
py::tuple layout(const std::string& op) {
  static const std::map<std::string, std::pair<size_t, std::vector<python::Number>>> layouts{
#define DDPM_LAYOUT(kernel, Arguments) {#kernel, {sizeof(Arguments), python::layout_of<Arguments>()}},
      DDPM_KERNELS(DDPM_LAYOUT) DDPM_LAYOUT(attention, AttentionArguments)
#undef DDPM_LAYOUT
  };
  const auto found = layouts.find(op);
  if (found == layouts.end()) throw py::value_error("there is no kernel " + op);
  py::list numbers;
  for (const python::Number& number : found->second.second) numbers.append(py::make_tuple(number.name, number.offset, number.type));
  return py::make_tuple(found->second.first, numbers);
}

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
  m.doc() = "Native kernels of ddpm_fast. They check memory, dtypes and strides, nothing else; use ddpm_fast.ops instead.";
  m.def("build_info", &build_info, "How this module was built and which instruction sets this processor offers it.");
  m.def("isa", [] { return cpu::kernels().isa; }, "The instruction set in use.");
  m.def(
      "select_isa",
      [](const char* isa) {
        if (!cpu::select_isa(isa)) throw py::value_error(std::string("this processor does not run the ") + isa + " build");
      },
      py::arg("isa").none(true), "For tests: use this build of the CPU kernels; None goes back to the best.");
  m.def("layout", &layout, "For tests: (bytes of a kernel's struct, [(name of a number, offset, NumPy's type), ...]).");
  m.add_object("first_out_of_range", py::reinterpret_steal<py::object>(PyCFunction_New(&first_out_of_range_method, nullptr)));
  m.add_object("noise_words", py::reinterpret_steal<py::object>(PyCFunction_New(&noise_words_method, nullptr)));
  m.def("conv3x3_floats", &conv3x3_floats, py::arg("channels_in"), py::arg("channels_out"));
  try {
    add_cpu_kernels(m.ptr());
#if defined(DDPM_FAST_CUDA)
    add_cuda_kernels(m.ptr());
    add_plans(m);
    m.def("cuda_problem", &cuda::problem, py::arg("device"), "Why the CUDA kernels cannot start on a device; empty where they can.");
#endif
  } catch (const python::Raised&) {
    throw py::error_already_set();
  }
}
