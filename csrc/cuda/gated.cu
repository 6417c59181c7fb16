// silu(gate) * up and gelu(gate) * up; arXiv:2002.05202, equation 6. The arithmetic of cpu/inference/layers.cpp.
#include "common.cuh"

template <bool Gelu>
__device__ inline float activate(float x) {
    if (!Gelu) return __fdiv_rn(x, 1.0f + expf(-x));
    const float z = 0.797884561f * (x + 0.044715f * (x * x * x));
    return __fdiv_rn(x, 1.0f + expf(-2.0f * z));
}

template <int T, bool Gelu>
__global__ void gated(const void* gate_up, i64 stride, void* out, i64 out_stride, i64 num_rows, i64 width) {
    const i64 step = i64(gridDim.x) * blockDim.x;
    for (i64 k = i64(blockIdx.x) * blockDim.x + threadIdx.x; k < num_rows * width; k += step) {
        const i64 row = k / width, i = k % width;
        const float gate = Memory<T>::load(gate_up, row * stride + i);
        const float up = Memory<T>::load(gate_up, row * stride + width + i);
        Memory<T>::store(out, row * out_stride + i, activate<Gelu>(gate) * up);
    }
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(T)                                                              \
    template __global__ void gated<T, false>(const void*, i64, void*, i64, i64, i64); \
    template __global__ void gated<T, true>(const void*, i64, void*, i64, i64, i64);
INSTANTIATE(F32) INSTANTIATE(BF16) INSTANTIATE(F16)
#endif
