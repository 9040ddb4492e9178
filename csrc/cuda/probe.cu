// Whether the kernels of this build can start on a device: it is asked of one that does nothing, before any other is launched.
#include "probe.h"

#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

__global__ void probe_kernel() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string problem(int device) {
  const char* const error = launch_on(device, [] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, probe_kernel);
  });
  if (!error) return "";
  cudaGetLastError();  // else the next launch would be taken for the one that failed
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return std::string(error) + " (kernels built with CUDA " + version(CUDART_VERSION) + ", driver " +
         (driver ? "for CUDA " + version(driver) : "not found") + ")";
}

}  // namespace ddpm_fast::cuda
