#pragma once
#include <string>

namespace ddpm_fast::cuda {

// Why no kernel of this build can start on a device, with both versions; empty where one can.
std::string problem(int device);

}  // namespace ddpm_fast::cuda
