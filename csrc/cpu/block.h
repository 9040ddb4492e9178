// Blocks: the unit of work of every kernel. A block is a run of elements of one sample whose fp32 values fit the first-level
// cache; other storage types are turned into fp32 in a buffer there, fp32 is read and written in place.
#pragma once
#include "normals.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int64_t block_elements = Normals::capacity;  // 4 KiB a buffer
constexpr int64_t chunks_a_sample = 64;                // at most: what a sum over a large sample is split into

struct alignas(64) Buffer {
  Buffer() {}  // leaves the values as they are
  float values[block_elements];
};

// Elements [offset, offset + count) in fp32: where they lie, or converted into the buffer.
DDPM_INLINE const float* read(const View& view, int64_t offset, int64_t count, Buffer& buffer) {
  switch (view.dtype) {
    case DType::bfloat16: {
      const bfloat16_t* in = static_cast<const bfloat16_t*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) buffer.values[i] = to_float(in[i]);
      return buffer.values;
    }
    case DType::float16: {
      const float16_t* in = static_cast<const float16_t*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) buffer.values[i] = to_float(in[i]);
      return buffer.values;
    }
    default: return static_cast<const float*>(view.data) + offset;
  }
}

// Where to put fp32 results: their place, or the buffer; `write` then converts what is in the buffer.
DDPM_INLINE float* place_for(const View& view, int64_t offset, Buffer& buffer) {
  return view.dtype == DType::float32 ? static_cast<float*>(view.data) + offset : buffer.values;
}
DDPM_INLINE void write(const View& view, int64_t offset, int64_t count, const Buffer& buffer) {
  if (view.dtype == DType::bfloat16) {
    bfloat16_t* out = static_cast<bfloat16_t*>(view.data) + offset;
    for (int64_t i = 0; i < count; ++i) from_float(buffer.values[i], out[i]);
  } else if (view.dtype == DType::float16) {
    float16_t* out = static_cast<float16_t*>(view.data) + offset;
    for (int64_t i = 0; i < count; ++i) from_float(buffer.values[i], out[i]);
  }
}
DDPM_INLINE void write_zeros(const View& view, int64_t offset, int64_t count) {
  const int64_t bytes = view.dtype == DType::float32 ? 4 : 2;
  std::memset(static_cast<char*>(view.data) + offset * bytes, 0, size_t(count * bytes));
}

// A thread's ε, block by block: read from the tensor, or drawn.
class Epsilon {
 public:
  Epsilon(const NoiseSource& source, const Sizes& sizes) : source_(source), elements_(sizes.elements), normals_(source.key, sizes) {}
  const float* block(int64_t sample, int64_t first, int64_t count) {
    if (source_.tensor.data) return read(source_.tensor, sample * elements_ + first, count, buffer_);
    return normals_.draw(sample, first, count);
  }

 private:
  const NoiseSource& source_;
  const int64_t elements_;
  Normals normals_;
  Buffer buffer_;
};

// Sum of a block: 64 running sums, then a tree, so that the error grows with the logarithm of count and the order, and with it
// the result, is the same for any instruction set.
DDPM_INLINE float sum(const float* values, int64_t count) {
  constexpr int lanes = 64;
  alignas(64) float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += values[i + lane];
  for (int lane = 0; i + lane < count; ++lane) sums[lane] += values[i + lane];
  for (int width = lanes / 2; width; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

DDPM_INLINE int64_t blocks_of(int64_t elements) { return (elements + block_elements - 1) / block_elements; }

// Calls body(state, sample, first, count) for each block of each sample; each thread makes its own State from the arguments.
template <typename State, typename Arguments, typename Body>
void for_each_block(const Arguments& a, const Body& body) {
  const int64_t elements = a.sizes.elements, per_sample = blocks_of(elements);
  if (a.sizes.samples == 0 || elements == 0) return;
  parallel_ranges(a.sizes.samples * per_sample, a.sizes.samples * elements, a.sizes.threads, [&](int64_t task, int64_t last) {
    State state(a);
    int64_t sample = task / per_sample, first = task % per_sample * block_elements;
    for (; task < last; ++task) {
      body(state, sample, first, elements - first < block_elements ? elements - first : block_elements);
      if ((first += block_elements) >= elements) first = 0, ++sample;
    }
  });
}

// Not std::vector: its functions would be shared with the builds for other instruction sets.
struct Partials {
  explicit Partials(int64_t count) : sums(count ? new double[size_t(count)] : nullptr) {}
  ~Partials() { delete[] sums; }
  Partials(const Partials&) = delete;
  double* const sums;
};

// The same where body(state, sample, first, count, totals) adds to `width` sums over the sample; calls finish(sample, totals). A
// large sample is summed in chunks, whose bounds depend on its size alone: any number of threads gives the same bits.
template <typename State, int width, typename Arguments, typename Body, typename Finish>
void sum_each_sample(const Arguments& a, const Body& body, const Finish& finish) {
  const int64_t samples = a.sizes.samples, elements = a.sizes.elements, blocks = blocks_of(elements);
  const int64_t blocks_a_chunk = (blocks + chunks_a_sample - 1) / chunks_a_sample, chunk = blocks_a_chunk * block_elements;
  const int64_t chunks = (blocks + blocks_a_chunk - 1) / blocks_a_chunk;
  const Partials partial(chunks > 1 ? samples * chunks * width : 0);
  parallel_ranges(samples * chunks, samples * elements, a.sizes.threads, [&](int64_t task, int64_t last) {
    State state(a);
    for (; task < last; ++task) {
      const int64_t sample = chunks > 1 ? task / chunks : task;
      int64_t first = chunks > 1 ? task % chunks * chunk : 0;
      const int64_t end = first + chunk < elements ? first + chunk : elements;
      double totals[width] = {};
      for (; first < end; first += block_elements)
        body(state, sample, first, end - first < block_elements ? end - first : block_elements, totals);
      if (chunks == 1) finish(sample, totals);
      for (int k = 0; chunks > 1 && k < width; ++k) partial.sums[task * width + k] = totals[k];
    }
  });
  for (int64_t sample = 0; chunks > 1 && sample < samples; ++sample) {
    double totals[width] = {};
    for (int64_t i = 0; i < chunks * width; ++i) totals[i % width] += partial.sums[sample * chunks * width + i];
    finish(sample, totals);
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
