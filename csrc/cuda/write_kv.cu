// Keys or values of new tokens into a paged cache, as they are or as int8 with a scale. One block a token and head.
#include "rows.cuh"

template <int T, bool Int8>
__global__ void write_kv(void* from, i64 token_stride, i64 head_stride, void* cache, float* scales, const i64* slots,
                         int num_heads, int dim, int block_size) {
    const i64 row = blockIdx.x, slot = slots[row / num_heads];
    if (slot < 0) return;
    const i64 at = Rows{from, token_stride, head_stride}.offset(row, num_heads);
    const i64 place = (slot / block_size * num_heads + row % num_heads) * block_size + slot % block_size;
    if (!Int8) {
        for (int i = threadIdx.x; i < dim; i += kRowThreads) {
            Memory<T>::store(cache, place * dim + i, Memory<T>::load(from, at + i));
        }
        return;
    }
    float largest = 0.0f;
    for (int i = threadIdx.x; i < dim; i += kRowThreads) {
        const float x = fabsf(Memory<T>::load(from, at + i));
        largest = x > largest || x != x ? x : largest;
    }
    const float top = block_reduce<true>(largest);
    const float scale = __fdiv_rn(top, 127.0f) + top * 0.0f;  // NaN if it is infinite
    if (threadIdx.x == 0) scales[place] = scale;
    for (int i = threadIdx.x; i < dim; i += kRowThreads) {
        const float q = scale > 0.0f ? rintf(__fdiv_rn(Memory<T>::load(from, at + i), scale)) : 0.0f;
        static_cast<signed char*>(cache)[place * dim + i] = (signed char)(fminf(fmaxf(q, -127.0f), 127.0f));
    }
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(T)                                                                                           \
    template __global__ void write_kv<T, false>(void*, i64, i64, void*, float*, const i64*, int, int, int);      \
    template __global__ void write_kv<T, true>(void*, i64, i64, void*, float*, const i64*, int, int, int);
INSTANTIATE(F32) INSTANTIATE(BF16) INSTANTIATE(F16)
#endif
