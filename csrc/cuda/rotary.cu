// Rotary position embedding in place; arXiv:2104.09864, equation 34. One thread a pair of elements.
#include "rows.cuh"

template <int T>
__global__ void rotary(void* x, i64 token_stride, i64 head_stride, int num_heads, const float* cos, i64 cos_stride,
                       const float* sin, i64 sin_stride, const i64* positions, i64 num_tokens, int half,
                       int interleaved) {
    const Rows rows{x, token_stride, head_stride};
    const i64 stride = i64(gridDim.x) * blockDim.x, count = num_tokens * num_heads * half;
    for (i64 k = i64(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
        const i64 row = k / half, i = k % half, position = positions[row / num_heads];
        const float c = cos[position * cos_stride + i], s = sin[position * sin_stride + i];
        const i64 at = rows.offset(row, num_heads);
        const i64 one = at + (interleaved ? 2 * i : i), two = at + (interleaved ? 2 * i + 1 : half + i);
        const float a = Memory<T>::load(x, one), b = Memory<T>::load(x, two);
        Memory<T>::store(x, one, a * c - b * s);
        Memory<T>::store(x, two, b * c + a * s);
    }
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(T)                                                                                              \
    template __global__ void rotary<T>(void*, i64, i64, int, const float*, i64, const float*, i64, const i64*, i64, \
                                       int, int);
INSTANTIATE(F32) INSTANTIATE(BF16) INSTANTIATE(F16)
#endif
