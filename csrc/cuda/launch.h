// What every launcher needs: the right device while it launches, and the caller's afterwards.
#pragma once
#include <cuda_runtime.h>

namespace ddpm_fast::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error != cudaSuccess || before_ == device) return;
    error = cudaSetDevice(device);
    changed_ = error == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;  // not cudaSuccess: nothing may be launched

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace ddpm_fast::cuda
