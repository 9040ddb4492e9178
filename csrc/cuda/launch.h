// What every launcher does around its launches.
#pragma once
#include <cuda_runtime_api.h>

namespace ddpm_fast::cuda {

// Makes `device` the current one until the end of the scope. Where that failed, `error` says why.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    changed_ = error == cudaSuccess && before_ != device;
    if (changed_) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error = cudaSuccess;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace ddpm_fast::cuda
