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
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

inline PyObject* interned(const char* name) { return Owned(PyUnicode_InternFromString(name)).release(); }

// A method without arguments, or an attribute, of torch.Tensor itself, called as Python calls it once it has found it: a third of the time.
class Member {
 public:
  Member(PyObject* type, const char* name) : name_(interned(name)) {
    const Owned found(PyObject_GetAttr(type, name_));  // the type keeps it
    if (Py_TYPE(found.get()) == &PyMethodDescr_Type) {
      const PyMethodDef& method = *reinterpret_cast<PyMethodDescrObject*>(found.get())->d_method;
      if (method.ml_flags == METH_NOARGS) plain_ = method.ml_meth;
      if (method.ml_flags == (METH_VARARGS | METH_KEYWORDS))
        keywords_ = reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(method.ml_meth));
    } else if (Py_TYPE(found.get()) == &PyGetSetDescr_Type) {
      attribute_ = reinterpret_cast<PyGetSetDescrObject*>(found.get())->d_getset;
    }
  }
  // direct: whether x is of the type itself, whose members no subclass has changed.
  PyObject* get(PyObject* x, bool direct) const {
    return direct && attribute_ ? attribute_->get(x, attribute_->closure) : PyObject_GetAttr(x, name_);
  }
  PyObject* call(PyObject* x, bool direct) const {
    if (direct && plain_) return plain_(x, nullptr);
    if (direct && keywords_) return keywords_(x, no_arguments_, nullptr);
    return PyObject_CallMethodNoArgs(x, name_);
  }
  PyObject* name() const { return name_; }

 private:
  PyObject* const name_;
  PyObject* const no_arguments_ = Owned(PyTuple_New(0)).release();
  PyCFunction plain_ = nullptr;
  PyCFunctionWithKeywords keywords_ = nullptr;
  const PyGetSetDef* attribute_ = nullptr;
};

// What is looked up once. It lives as long as the process.
struct Torch {
  static const Torch& get() {
    static const Torch* const torch = new Torch();  // anew at the next call where it throws
    return *torch;
  }

  PyObject* const module = Owned(PyImport_ImportModule("torch")).release();
  PyObject* const tensor = Owned(PyObject_GetAttrString(module, "Tensor")).release();
  PyObject *parameter, *dtypes[3], *int64, *channels_last, *channels_last_3d, *get_num_threads;
  const Member data_ptr{tensor, "data_ptr"}, dtype{tensor, "dtype"}, is_contiguous{tensor, "is_contiguous"}, shape{tensor, "shape"},
      stride{tensor, "stride"}, numel{tensor, "numel"};
  PyObject* const memory_format = interned("memory_format");
  PyObject* const memory_format_names = Owned(PyTuple_Pack(1, memory_format)).release();
  PyObject* const seed = interned("seed");
  PyObject* const stream = interned("stream");
  PyObject* const first_sample = interned("first_sample");

 private:
  Torch() {
    const Owned nn(PyObject_GetAttrString(module, "nn"));
    const auto of_torch = [&](const char* name) { return Owned(PyObject_GetAttrString(module, name)).release(); };
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

inline bool is_plain(PyObject* x) {
  const Torch& torch = Torch::get();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return type == torch.tensor || type == torch.parameter;
}

inline bool is_tensor(PyObject* x) {
  if (is_plain(x)) return true;
  const int is = PyObject_IsInstance(x, Torch::get().tensor);
  if (is < 0) throw Raised();
  return is;
}

inline int64_t to_int64(PyObject* x) {
  if (PyLong_CheckExact(x)) {
    const int64_t value = PyLong_AsLongLong(x);
    if (value == -1 && PyErr_Occurred()) throw Raised();
    return value;
  }
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
  static Integers shape(PyObject* x) { return Integers(Torch::get().shape.get(x, is_plain(x))); }
  static Integers strides(PyObject* x) { return Integers(Torch::get().stride.call(x, is_plain(x))); }
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

inline bool has_dtype(PyObject* x, PyObject* dtype) { return Owned(Torch::get().dtype.get(x, is_plain(x))).get() == dtype; }

inline int64_t numel(PyObject* x) { return to_int64(Owned(Torch::get().numel.call(x, is_plain(x))).get()); }

// Null for a tensor without elements.
inline void* address(PyObject* x) {
  const Owned pointer(Torch::get().data_ptr.call(x, is_plain(x)));
  void* const address = PyLong_AsVoidPtr(pointer.get());
  if (!address) {
    if (PyErr_Occurred()) throw Raised();
    if (numel(x))
      raise(PyExc_ValueError, "a tensor has no memory to read: its storage was freed, or it stands for values without holding them");
  }
  return address;
}

inline bool is_contiguous(PyObject* x, bool channels_last = false) {
  const Torch& torch = Torch::get();
  if (!channels_last) return Owned(torch.is_contiguous.call(x, is_plain(x))).get() == Py_True;
  PyObject* const arguments[] = {x, Integers::shape(x).size() == 5 ? torch.channels_last_3d : torch.channels_last};
  return Owned(PyObject_VectorcallMethod(torch.is_contiguous.name(), arguments, 1, torch.memory_format_names)).get() == Py_True;
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
