// What every launcher does around its launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../common/dtype.h"

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

// launch(a value of the data's type), which returns an error.
template <typename Launch>
cudaError_t launch_for(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::float32: return launch(float{});
    case DType::bfloat16: return launch(__nv_bfloat16{});
    case DType::float16: return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

// Calls launches(), which returns an error, with `device` the current one. Null, or the error's text.
template <typename Launches>
const char* launch_on(int device, const Launches& launches) {
  const DeviceGuard guard(device);
  const cudaError_t error = guard.error == cudaSuccess ? launches() : guard.error;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ddpm_fast::cuda
