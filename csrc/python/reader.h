// From Python's values to the fields of a kernel's struct: what is read of a tensor, a Noise and a number, and what is refused.
#pragma once
#include <string>

#include "tensor.h"

namespace ddpm_fast::python {

// Fills a struct from Python's values, which come in the order of Names; null for one that was not given.
class Reader {
 public:
  Reader(const char* op, bool second, PyObject* const* names, PyObject* const* values)
      : op_(op), second_(second), names_(names), values_(values) {}

  template <typename Field>
  void operator()(const char*, Field& field, const Rule& rule = {}) {
    const Need need = second_ ? rule.use.second : rule.use.first;
    PyObject* value = nullptr;
    if (need != Need::absent) {
      name_ = *names_++;
      value = *values_++;
      if (!value && need == Need::required) refuse(PyExc_TypeError, "is missing");
    }
    if (value == Py_None && need == Need::optional) value = nullptr;
    read(value, field, rule);
  }
  void threads(const char*, int& field) { field = python::threads(); }

 private:
  [[noreturn]] void refuse(PyObject* type, const std::string& what) const {
    raise(type, std::string(op_) + ": " + PyUnicode_AsUTF8(name_) + " " + what);
  }
  [[noreturn]] void refuse_kind(const std::string& expected, PyObject* got) const {
    std::string kind = Py_TYPE(got)->tp_name;
    if (is_tensor(got)) {
      const Owned dtype(Torch::get().dtype.get(got, false)), text(PyObject_Str(dtype.get()));
      kind = std::string("a tensor of ") + PyUnicode_AsUTF8(text.get());
    }
    refuse(PyExc_TypeError, "must be " + expected + ", got " + kind);
  }

  // Tensors.

  void* memory(PyObject* x, bool channels_last) const {
    if (!is_contiguous(x, channels_last))
      refuse(PyExc_ValueError, channels_last ? "must be contiguous in channels_last" : "must be contiguous");
    return address(x);
  }
  void* memory(PyObject* x, PyObject* dtype, const char* expected, const Rule& rule) const {
    if (!x) return nullptr;
    if (!is_tensor(x) || !has_dtype(x, dtype)) refuse_kind(expected, x);
    return memory(x, rule.channels_last);
  }
  DType dtype(PyObject* x, const Rule& rule) const {
    const Torch& torch = Torch::get();
    if (!is_tensor(x)) refuse_kind("a tensor", x);
    const Owned dtype(torch.dtype.get(x, is_plain(x)));
    if (rule.like && rule.like->data) {
      const int like = int(rule.like->dtype);
      static const char* const names[] = {"torch.float32", "torch.bfloat16", "torch.float16"};
      if (dtype.get() != torch.dtypes[like]) refuse_kind(std::string("a tensor of ") + names[like], x);
      return rule.like->dtype;
    }
    for (int i = 0; i < 3; ++i)
      if (dtype.get() == torch.dtypes[i]) return DType(i);
    refuse_kind("a tensor of float32, bfloat16 or float16", x);
  }
  static View absent(const Rule& rule) { return {nullptr, rule.like ? rule.like->dtype : DType::float32}; }

  void read(PyObject* x, View& view, const Rule& rule) const {
    view = absent(rule);
    if (!x) return;
    view.dtype = dtype(x, rule);
    view.data = memory(x, rule.channels_last);
  }
  void read(PyObject* x, Rows& rows, const Rule& rule) const {
    rows = {absent(rule), 0};
    if (!x) return;
    rows.view.dtype = dtype(x, rule);
    if (is_contiguous(x)) {
      rows.stride = sizes_ && sizes_->samples ? numel(x) / sizes_->samples : Integers::shape(x).product(1);
    } else {
      const Integers shape = Integers::shape(x), strides = Integers::strides(x);
      if (!samples_lie(shape, strides, 1)) refuse(PyExc_ValueError, "must be contiguous in each sample");
      rows.stride = strides[0];
    }
    rows.view.data = address(x);
  }
  // (tensor, sample stride, element stride)
  void read(PyObject* x, Broadcast& broadcast, const Rule& rule) const {
    if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != 3) refuse_kind("(tensor, sample stride, element stride)", x);
    PyObject* const tensor = PyTuple_GET_ITEM(x, 0);
    broadcast.view.dtype = dtype(tensor, rule);
    broadcast.sample_stride = to_int64(PyTuple_GET_ITEM(x, 1));
    broadcast.element_stride = to_int64(PyTuple_GET_ITEM(x, 2));
    const bool usual = broadcast.element_stride == 1 && broadcast.sample_stride == sizes_->elements && is_contiguous(tensor);
    if (!usual) {
      const Integers shape = Integers::shape(tensor), strides = Integers::strides(tensor);
      const bool lies = samples_lie(shape, strides, broadcast.element_stride) && (shape[0] <= 1 || strides[0] == broadcast.sample_stride);
      if (!lies || broadcast.element_stride < 0 || broadcast.element_stride > 1) refuse(PyExc_ValueError, "must be strided as is said");
    }
    broadcast.view.data = address(tensor);
  }
  void read(PyObject* x, Filters& filters, const Rule&) const {
    const Torch& torch = Torch::get();
    if (!is_tensor(x) || !has_dtype(x, torch.dtypes[0])) refuse_kind("a tensor of torch.float32", x);
    const Integers strides = Integers::strides(x);
    if (strides.size() != 4) refuse(PyExc_ValueError, "must have four dimensions");
    for (int i = 0; i < 4; ++i) filters.strides[i] = strides[i];
    filters.data = static_cast<const float*>(address(x));
  }
  void read(PyObject* x, const float*& data, const Rule& rule) const { data = static_cast<const float*>(floats(x, rule)); }
  void read(PyObject* x, float*& data, const Rule& rule) const { data = static_cast<float*>(floats(x, rule)); }
  void* floats(PyObject* x, const Rule& rule) const { return memory(x, Torch::get().dtypes[0], "a tensor of torch.float32", rule); }
  void read(PyObject* x, const int64_t*& data, const Rule& rule) const {
    data = static_cast<const int64_t*>(memory(x, Torch::get().int64, "a tensor of torch.int64", rule));
  }

  // A tensor (N, ...) whose sizes they are.
  void read(PyObject* x, Sizes& sizes, const Rule&) {
    if (!is_tensor(x)) refuse_kind("a tensor", x);
    const Integers shape = Integers::shape(x);
    if (!shape.size()) refuse(PyExc_ValueError, "must be (N, ...)");
    sizes = {shape[0], shape.product(1), python::threads()};
    sizes_ = &sizes;
  }

  // Noise: (seed, stream, first sample), or an object with these.
  void read(PyObject* x, NoiseKey& key, const Rule&) const {
    const Torch& torch = Torch::get();
    if (PyTuple_CheckExact(x) && PyTuple_GET_SIZE(x) == 3) {
      key = {to_uint64(PyTuple_GET_ITEM(x, 0)), stream(PyTuple_GET_ITEM(x, 1)), to_uint64(PyTuple_GET_ITEM(x, 2))};
      return;
    }
    PyObject* const seed = PyObject_GetAttr(x, torch.seed);
    if (!seed) {
      PyErr_Clear();
      refuse_kind("a Noise", x);
    }
    const Owned owned(seed), of_stream(PyObject_GetAttr(x, torch.stream)), first_sample(PyObject_GetAttr(x, torch.first_sample));
    key = {to_uint64(seed), stream(of_stream.get()), to_uint64(first_sample.get())};
  }
  uint32_t stream(PyObject* x) const {
    const uint64_t value = to_uint64(x);
    if (value >> 32) refuse(PyExc_OverflowError, "must have a stream below 2^32");
    return uint32_t(value);
  }
  void read(PyObject* x, NoiseSource& source, const Rule& rule) const {
    source = {absent(rule), {}, false};
    if (!x || x == Py_None) return;
    source.present = true;
    if (is_tensor(x)) read(x, source.tensor, rule);
    else read(x, source.key, rule);
  }
  // (probability, Noise), or None
  void read(PyObject* x, Dropout& dropout, const Rule& rule) const {
    dropout = {0, 1.0f, {}};
    if (x == Py_None) return;
    if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != 2) refuse_kind("(probability, Noise)", x);
    const double probability = real(PyTuple_GET_ITEM(x, 0));
    if (!(probability >= 0.0 && probability < 1.0)) refuse(PyExc_ValueError, "must have a probability in [0, 1)");
    dropout.threshold = uint32_t(probability * 0x1p32);
    dropout.scale = float(1.0 / (1.0 - probability));
    read(PyTuple_GET_ITEM(x, 1), dropout.key, rule);
  }

  // Numbers.

  double real(PyObject* x) const {
    const double value = PyFloat_AsDouble(x);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      refuse_kind("a number", x);
    }
    return value;
  }
  void read(PyObject* x, float& value, const Rule&) const { value = float(real(x)); }
  void read(PyObject* x, int64_t& value, const Rule&) const {
    if (!PyIndex_Check(x)) refuse_kind("an integer", x);
    value = to_int64(x);
  }
  void read(PyObject* x, int& value, const Rule& rule) const {
    int64_t wide;
    read(x, wide, rule);
    value = int(wide);
    if (value != wide) refuse(PyExc_OverflowError, "must fit 32 bits");
  }
  void read(PyObject* x, bool& value, const Rule&) const {
    const int truth = x == Py_True ? 1 : x == Py_False ? 0 : PyLong_Check(x) || PyFloat_Check(x) ? PyObject_IsTrue(x) : -1;
    if (truth < 0) refuse_kind("True or False", x);
    value = truth;
  }
  void read(PyObject* x, void*& handle, const Rule&) const {
    if (!PyLong_Check(x)) refuse_kind("an integer", x);
    handle = PyLong_AsVoidPtr(x);
    if (!handle && PyErr_Occurred()) throw Raised();
  }
  void read(PyObject* x, Variance& variance, const Rule&) const {
    static const char* const names[] = {"fixed", "learned", "learned_range"};
    for (int i = 0; PyUnicode_Check(x) && i < 3; ++i)
      if (PyUnicode_CompareWithASCIIString(x, names[i]) == 0) {
        variance = Variance(i);
        return;
      }
    refuse(PyExc_ValueError, "must be fixed, learned or learned_range");
  }

  const char* const op_;
  const bool second_;
  PyObject* const* names_;
  PyObject* const* values_;
  PyObject* name_ = nullptr;
  const Sizes* sizes_ = nullptr;
};

}  // namespace ddpm_fast::python
