// Makes transfer engines part of the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace accel::transfer {

void bind(pybind11::module_& m);

}  // namespace accel::transfer
