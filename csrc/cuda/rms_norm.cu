// RMSNorm with the addition to the residual before it; arXiv:1910.07467, equation 4. One block a row.
#include "rows.cuh"

template <int T, int W>
__global__ void rms_norm(void* x, i64 x_token, i64 x_head, void* residual, i64 residual_token, i64 residual_head, void* out,
                         i64 out_token, i64 out_head, const void* weight, int num_heads, int dim, float eps,
                         float weight_offset) {
    const i64 row = blockIdx.x;
    const Rows sources{x, x_token, x_head}, residuals{residual, residual_token, residual_head};
    const Rows results{out, out_token, out_head};
    const i64 from = sources.offset(row, num_heads), sum = residuals.offset(row, num_heads);
    const i64 to = results.offset(row, num_heads);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < dim; i += kRowThreads) {
        float y = Memory<T>::load(x, from + i);
        if (residual != nullptr) {
            Memory<T>::store(residual, sum + i, y + Memory<T>::load(residual, sum + i));
            y = Memory<T>::load(residual, sum + i);  // as rounded
        }
        squares += y * y;
    }
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(block_reduce<false>(squares), float(dim)) + eps));
    const void* source = residual != nullptr ? residual : x;
    const i64 at = residual != nullptr ? sum : from;
    for (int i = threadIdx.x; i < dim; i += kRowThreads) {
        const float w = Memory<W>::load(weight, i) + weight_offset;
        Memory<T>::store(out, to + i, Memory<T>::load(source, at + i) * inverse * w);
    }
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(T, W)                                                                                          \
    template __global__ void rms_norm<T, W>(void*, i64, i64, void*, i64, i64, void*, i64, i64, const void*, int, int, \
                                            float, float);
INSTANTIATE(F32, F32) INSTANTIATE(BF16, F32) INSTANTIATE(BF16, BF16) INSTANTIATE(F16, F32) INSTANTIATE(F16, F16)
#endif
