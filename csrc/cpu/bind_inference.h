// The inference kernels in Python: addresses, strides and sizes in, as one tuple of integers for each struct.
#pragma once
#include <pybind11/pybind11.h>

namespace accel {

void bind_inference(pybind11::module_& m);

}  // namespace accel
