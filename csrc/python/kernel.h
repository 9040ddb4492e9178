// Makes a Python function of a kernel: called with the names of its struct's fields (common/arguments.h) and nothing else.
//
// The values live as long as the call, or as a call that is kept (prepared), and so does the memory of tensors among them.
#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "reader.h"

namespace ddpm_fast::python {

// A struct's fields as a kernel is called with them.
class Names {
 public:
  explicit Names(bool second) : second_(second) {}
  template <typename Field>
  void operator()(const char* name, Field&, const Rule& rule = {}) {
    if ((second_ ? rule.use.second : rule.use.first) != Need::absent) names.push_back(interned(name));
  }
  void threads(const char*, int&) {}
  std::vector<PyObject*> names;

 private:
  const bool second_;
};

// One number of a struct: its path, such as "dropout.key.seed", where it lies, and NumPy's name of its type.
struct Number {
  std::string name;
  size_t offset;
  std::string type;
};

class Layout {
 public:
  explicit Layout(const void* start) : start_(static_cast<const char*>(start)) {}
  template <typename Field>
  void operator()(const std::string& name, Field& field, const Rule& = {}) {
    add(name, field);
  }
  void threads(const std::string& name, int& field) { add(name, field); }
  std::vector<Number> numbers;

 private:
  template <typename T>
  void number(const std::string& name, const T& field, char kind) {
    numbers.push_back({name, size_t(reinterpret_cast<const char*>(&field) - start_), kind + std::to_string(sizeof field)});
  }
  void add(const std::string& name, const bool& x) { number(name, x, 'b'); }
  void add(const std::string& name, const int& x) { number(name, x, 'i'); }
  void add(const std::string& name, const int64_t& x) { number(name, x, 'i'); }
  void add(const std::string& name, const uint32_t& x) { number(name, x, 'u'); }
  void add(const std::string& name, const uint64_t& x) { number(name, x, 'u'); }
  void add(const std::string& name, const float& x) { number(name, x, 'f'); }
  void add(const std::string& name, const Variance& x) { number(name, x, 'i'); }
  template <typename T>
  void add(const std::string& name, T* const& x) {
    number(name, x, 'u');
  }
  void add(const std::string& name, const View& x) {
    add(name + ".data", x.data);
    number(name + ".dtype", x.dtype, 'i');
  }
  void add(const std::string& name, const Rows& x) {
    add(name + ".view", x.view);
    add(name + ".stride", x.stride);
  }
  void add(const std::string& name, const Broadcast& x) {
    add(name + ".view", x.view);
    add(name + ".sample_stride", x.sample_stride);
    add(name + ".element_stride", x.element_stride);
  }
  void add(const std::string& name, const NoiseKey& x) {
    add(name + ".seed", x.seed);
    add(name + ".stream", x.stream);
    add(name + ".first_sample", x.first_sample);
  }
  void add(const std::string& name, const NoiseSource& x) {
    add(name + ".tensor", x.tensor);
    add(name + ".key", x.key);
    add(name + ".present", x.present);
  }
  void add(const std::string& name, const Dropout& x) {
    add(name + ".threshold", x.threshold);
    add(name + ".scale", x.scale);
    add(name + ".key", x.key);
  }
  void add(const std::string& name, const Sizes& x) {
    add(name + ".samples", x.samples);
    add(name + ".elements", x.elements);
    add(name + ".threads", x.threads);
  }
  void add(const std::string& name, const Filters& x) {
    add(name + ".data", x.data);
    for (int i = 0; i < 4; ++i) add(name + ".strides[" + std::to_string(i) + "]", x.strides[i]);
  }
  const char* const start_;
};

// A kernel as Python calls it. `run` and the rest are of one struct of arguments, which is plain data.
struct Kernel {
  const char* name;
  size_t size;
  std::vector<PyObject*> names;
  void (*read)(const Kernel&, PyObject* const* values, void* arguments);
  void (*run)(const Kernel&, const void* arguments);
  bool second;
};

constexpr size_t most_fields = 32, most_bytes = 1024;

// Python's values in the order of the fields. Names are compared by address, as Python's interned ones can be; in another order, or
// where they were made at run time, by what they say.
inline void sort(const Kernel& kernel, PyObject* const* given, Py_ssize_t positional, PyObject* keywords, PyObject** values) {
  if (positional) raise(PyExc_TypeError, std::string(kernel.name) + " takes its arguments by name");
  const size_t count = keywords ? size_t(PyTuple_GET_SIZE(keywords)) : 0, fields = kernel.names.size();
  size_t next = 0;
  for (size_t i = 0; i < fields; ++i) {
    const bool here = next < count && PyTuple_GET_ITEM(keywords, next) == kernel.names[i];
    values[i] = here ? given[next++] : nullptr;
  }
  if (next == count) return;
  std::memset(values, 0, fields * sizeof *values);
  for (size_t k = 0; k < count; ++k) {
    PyObject* const name = PyTuple_GET_ITEM(keywords, k);
    size_t i = 0;
    while (i < fields && PyUnicode_Compare(kernel.names[i], name)) ++i;
    if (i == fields) raise(PyExc_TypeError, std::string(kernel.name) + " has no argument " + PyUnicode_AsUTF8(name));
    values[i] = given[k];
  }
}

// Calls `body` where C++'s exceptions become Python's.
template <typename Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const Raised&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline const Kernel& kernel_of(PyObject* capsule) { return *static_cast<const Kernel*>(PyCapsule_GetPointer(capsule, nullptr)); }

inline PyObject* run(const Kernel& kernel, const void* arguments) {
  PyThreadState* const state = PyEval_SaveThread();
  std::string error;
  try {
    kernel.run(kernel, arguments);
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) raise(PyExc_RuntimeError, error);
  Py_RETURN_NONE;
}

inline PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
  return guarded([&] {
    const Kernel& kernel = kernel_of(self);
    PyObject* values[most_fields];
    alignas(8) char arguments[most_bytes];
    sort(kernel, given, positional, keywords, values);
    kernel.read(kernel, values, arguments);
    return run(kernel, arguments);
  });
}

// A call with its arguments read, and the objects that they came from.
struct Prepared {
  const Kernel& kernel;
  std::unique_ptr<char[]> arguments;
  PyObject* kept;
};

inline PyObject* call_prepared(PyObject* self, PyObject*) {
  return guarded([&] {
    const Prepared& prepared = *static_cast<const Prepared*>(PyCapsule_GetPointer(self, nullptr));
    return run(prepared.kernel, prepared.arguments.get());
  });
}

inline PyObject* prepare(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
  static PyMethodDef method{"prepared", &call_prepared, METH_NOARGS, "Runs the kernel on the arguments that it was prepared with."};
  return guarded([&] {
    const Kernel& kernel = kernel_of(self);
    PyObject* values[most_fields];
    std::unique_ptr<char[]> arguments(new char[kernel.size]);
    sort(kernel, given, positional, keywords, values);
    kernel.read(kernel, values, arguments.get());
    Owned kept(PyTuple_New(keywords ? PyTuple_GET_SIZE(keywords) : 0));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kept.get()); ++i) {
      Py_INCREF(given[i]);
      PyTuple_SET_ITEM(kept.get(), i, given[i]);
    }
    auto* const prepared = new Prepared{kernel, std::move(arguments), kept.release()};
    const Owned capsule(PyCapsule_New(prepared, nullptr, [](PyObject* capsule) {
      auto* const prepared = static_cast<Prepared*>(PyCapsule_GetPointer(capsule, nullptr));
      Py_DECREF(prepared->kept);
      delete prepared;
    }));
    return PyCFunction_New(&method, capsule.get());
  });
}

template <typename Arguments, auto Run>
void run_as(const Kernel& kernel, const void* arguments) {
  Run(kernel.name, *static_cast<const Arguments*>(arguments));
}

template <typename Arguments>
void read_as(const Kernel& kernel, PyObject* const* values, void* memory) {
  Arguments& arguments = *new (memory) Arguments{};
  Reader reader(kernel.name, kernel.second, kernel.names.data(), values);
  fields(reader, arguments);
}

using Function = PyObject*(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* keywords);

inline void add_function(PyObject* module, const std::string& name, PyObject* self, Function* function, const char* text) {
  const auto pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  const std::string& kept = *new std::string(name);
  auto* const method = new PyMethodDef{kept.c_str(), pointer, METH_FASTCALL | METH_KEYWORDS, text};
  const Owned made(PyCFunction_New(method, self));
  if (PyModule_AddObjectRef(module, kept.c_str(), made.get())) throw Raised();
}

// Adds `name`, which runs Run(name, arguments), and `name`_prepared, which gives a function of no arguments that does so each time.
// second: the struct's other kernel.
template <typename Arguments, auto Run>
void add_kernel(PyObject* module, const char* name, bool second = false) {
  static_assert(sizeof(Arguments) <= most_bytes && alignof(Arguments) <= 8);
  Arguments arguments{};
  Names names(second);
  fields(names, arguments);
  if (names.names.size() > most_fields) raise(PyExc_SystemError, std::string(name) + " has too many fields");
  auto* const kernel = new Kernel{name, sizeof(Arguments), names.names, &read_as<Arguments>, &run_as<Arguments, Run>, second};
  const Owned self(PyCapsule_New(kernel, nullptr, nullptr));
  add_function(module, name, self.get(), &call, "Runs the kernel; takes the fields of its struct in csrc/common/arguments.h by name.");
  add_function(module, std::string(name) + "_prepared", self.get(), &prepare,
               "The same as a function of no arguments, to be called often.");
}

template <typename Arguments>
std::vector<Number> layout_of() {
  Arguments arguments{};
  Layout layout(&arguments);
  fields(layout, arguments);
  return layout.numbers;
}

}  // namespace ddpm_fast::python
