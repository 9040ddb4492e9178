// randn: the noise contract on the GPU. A thread makes the four normals of one counter block and stores them with one
// instruction where the sample's length keeps them aligned. Writes samples * elements * sizeof(T) bytes, reads nothing.
#include <type_traits>

#include "launch.h"
#include "randn.h"
#include "storage.cuh"

namespace ddpm_fast::cuda {
namespace {

constexpr uint32_t threads_per_block = 256;  // about 30 registers a thread: eight blocks fill an SM of any architecture
constexpr uint32_t largest_grid_y = 65535;   // the hardware's limit

// Four values as one word.
template <typename T> using Packed4 = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

template <typename T>
__global__ void __launch_bounds__(threads_per_block) randn_kernel(
    T* __restrict__ out,  // (samples, elements)
    int64_t samples,
    int64_t elements,
    uint64_t seed,
    uint32_t stream,
    uint64_t first_sample) {
  const int64_t j = int64_t(blockIdx.x) * threads_per_block + threadIdx.x;
  const int64_t i = 4 * j;
  if (i >= elements) return;
  const bool whole = elements % 4 == 0;
  for (int64_t sample = blockIdx.y; sample < samples; sample += gridDim.y) {
    float z[4];
    normal4({seed, stream, first_sample}, first_sample + uint64_t(sample), uint32_t(j), z[0], z[1], z[2], z[3]);
    T values[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = narrow<T>(z[k]);
    T* const target = out + sample * elements + i;
    if (whole) {
      Packed4<T> packed;
      memcpy(&packed, values, sizeof packed);
      __stwb(reinterpret_cast<Packed4<T>*>(target), packed);  // a plain assignment is split into four stores here
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + k < elements) target[k] = values[k];
    }
  }
}

template <typename T>
cudaError_t launch(const RandnArguments& a, cudaStream_t stream) {
  const RandnPlan plan = randn_plan(a.sizes.samples, a.sizes.elements);
  randn_kernel<T><<<dim3(plan.grid_x, plan.grid_y), plan.block, 0, stream>>>(
      static_cast<T*>(a.out.data), a.sizes.samples, a.sizes.elements, a.key.seed, a.key.stream, a.key.first_sample);
  return cudaGetLastError();
}

}  // namespace

RandnPlan randn_plan(int64_t samples, int64_t elements) {
  const int64_t blocks = (elements + 3) / 4;
  return {uint32_t((blocks + threads_per_block - 1) / threads_per_block),
          samples < largest_grid_y ? uint32_t(samples) : largest_grid_y, threads_per_block};
}

const char* randn(const RandnArguments& a, int device, void* stream) {
  if (a.sizes.samples == 0 || a.sizes.elements == 0) return nullptr;
  return launch_on(device, [&] {
    return launch_for(a.out.dtype, [&](auto t) { return launch<decltype(t)>(a, static_cast<cudaStream_t>(stream)); });
  });
}

}  // namespace ddpm_fast::cuda
