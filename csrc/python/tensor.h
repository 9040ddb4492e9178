// Reads PyTorch's tensors through Python: their address, dtype and strides, without libtorch.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#include "../common/arguments.h"

namespace ddpm_fast::python {

// Thrown where Python's error is set.
struct Raised {};

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Raised();
}

// A reference that this owns.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw Raised();
  }
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() { PyObject* const object = object_; object_ = nullptr; return object; }

 private:
  PyObject* object_;
};

inline PyObject* interned(const char* name) { return Owned(PyUnicode_InternFromString(name)).release(); }

// What is looked up once. It lives as long as the process.
struct Torch {
  static const Torch& get() {
    static const Torch* const torch = new Torch();  // anew at the next call where it throws
    return *torch;
  }

  PyObject *tensor, *parameter, *dtypes[3], *int64, *channels_last, *channels_last_3d, *get_num_threads;
  PyObject* const data_ptr = interned("data_ptr");
  PyObject* const dtype = interned("dtype");
  PyObject* const is_contiguous = interned("is_contiguous");
  PyObject* const shape = interned("shape");
  PyObject* const stride = interned("stride");
  PyObject* const memory_format = interned("memory_format");
  PyObject* const memory_format_names = Owned(PyTuple_Pack(1, memory_format)).release();
  PyObject* const seed = interned("seed");
  PyObject* const stream = interned("stream");
  PyObject* const first_sample = interned("first_sample");

 private:
  Torch() {
    const Owned torch(PyImport_ImportModule("torch")), nn(PyObject_GetAttrString(torch.get(), "nn"));
    const auto of_torch = [&](const char* name) { return Owned(PyObject_GetAttrString(torch.get(), name)).release(); };
    tensor = of_torch("Tensor");
    parameter = Owned(PyObject_GetAttrString(nn.get(), "Parameter")).release();
    dtypes[int(DType::float32)] = of_torch("float32");
    dtypes[int(DType::bfloat16)] = of_torch("bfloat16");
    dtypes[int(DType::float16)] = of_torch("float16");
    int64 = of_torch("int64");
    channels_last = of_torch("channels_last");
    channels_last_3d = of_torch("channels_last_3d");
    get_num_threads = of_torch("get_num_threads");
  }
};

inline bool is_tensor(PyObject* x) {
  const Torch& torch = Torch::get();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  if (type == torch.tensor || type == torch.parameter) return true;
  const int is = PyObject_IsInstance(x, torch.tensor);
  if (is < 0) throw Raised();
  return is;
}

inline int64_t to_int64(PyObject* x) {
  const Owned index(PyNumber_Index(x));
  const int64_t value = PyLong_AsLongLong(index.get());
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

inline uint64_t to_uint64(PyObject* x) {
  const Owned index(PyNumber_Index(x));
  const uint64_t value = PyLong_AsUnsignedLongLong(index.get());
  if (value == uint64_t(-1) && PyErr_Occurred()) throw Raised();
  return value;
}

// torch.Size, or the strides: a tuple of integers.
class Integers {
 public:
  static Integers shape(PyObject* x) { return Integers(PyObject_GetAttr(x, Torch::get().shape)); }
  static Integers strides(PyObject* x) { return Integers(PyObject_CallMethodNoArgs(x, Torch::get().stride)); }
  Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_.get()); }
  int64_t operator[](Py_ssize_t i) const { return to_int64(PyTuple_GET_ITEM(tuple_.get(), i)); }
  int64_t product(Py_ssize_t from = 0) const {
    int64_t product = 1;
    for (Py_ssize_t i = from; i < size(); ++i) product *= (*this)[i];
    return product;
  }

 private:
  explicit Integers(PyObject* tuple) : tuple_(tuple) {
    if (!PyTuple_Check(tuple)) raise(PyExc_TypeError, "a tensor's sizes must be a tuple");
  }
  Owned tuple_;
};

// Null for a tensor without elements.
inline void* address(PyObject* x) {
  const Owned pointer(PyObject_CallMethodNoArgs(x, Torch::get().data_ptr));
  void* const address = PyLong_AsVoidPtr(pointer.get());
  if (!address) {
    if (PyErr_Occurred()) throw Raised();
    if (Integers::shape(x).product())
      raise(PyExc_ValueError, "a tensor has no memory to read: its storage was freed, or it stands for values without holding them");
  }
  return address;
}

inline bool is_contiguous(PyObject* x, bool channels_last = false) {
  const Torch& torch = Torch::get();
  PyObject* arguments[] = {x, nullptr};
  PyObject* names = nullptr;
  if (channels_last) {
    arguments[1] = Integers::shape(x).size() == 5 ? torch.channels_last_3d : torch.channels_last;
    names = torch.memory_format_names;
  }
  const Owned is(PyObject_VectorcallMethod(torch.is_contiguous, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, names));
  return is.get() == Py_True;
}

// Whether the elements of each sample lie `stride` (0 or 1) apart in their order.
inline bool samples_lie(const Integers& shape, const Integers& strides, int64_t stride) {
  for (Py_ssize_t i = shape.size() - 1; i > 0; --i) {
    if (shape[i] > 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

inline int threads() {
  const Owned count(PyObject_CallNoArgs(Torch::get().get_num_threads));
  return int(to_int64(count.get()));
}

}  // namespace ddpm_fast::python
