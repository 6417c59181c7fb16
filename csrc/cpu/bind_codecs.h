// The codec kernels' part of the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace accel {

void bind_codecs(pybind11::module_& m);

}  // namespace accel
