// The launch plans as functions of the module.
#pragma once
#include <pybind11/pybind11.h>

namespace ddpm_fast {

void add_plans(pybind11::module_& m);

}  // namespace ddpm_fast
