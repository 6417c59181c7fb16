// Scaled copy between fp32, bf16 and fp16: to nearest even, or stochastically. The arithmetic of cpu/kernels/cast.cpp.
#include "random.cuh"

__device__ inline u16 stochastic_bf16(float x, u32 random) {
    const u32 u = __float_as_uint(x);
    return (u & 0x7fffffffu) > 0x7f7f0000u ? float_to_bf16(x) : u16((u + (random & 0xffffu)) >> 16);
}

__device__ inline u16 stochastic_f16(float x, u32 random) {
    const u32 u = __float_as_uint(x);
    const u32 a = u & 0x7fffffffu;
    if (a > 0x477fe000u) return float_to_f16(x);
    const u32 sign = (u >> 16) & 0x8000u;
    const u32 exponent = a >> 23;
    if (exponent < 95) return u16(sign);
    const bool normal = exponent >= 113;
    const u32 mantissa = normal ? a : ((a & 0x7fffffu) | 0x800000u);
    const u32 drop = normal ? 13u : 126u - exponent;
    const u32 kept = (mantissa + (random & ((1u << drop) - 1u))) >> drop;
    return u16(sign | (normal ? kept - (112u << 10) : kept));
}

template <int S, int D, bool Stochastic>
__device__ inline void cast_one(const void* src, void* dst, i64 i, float scale, u64 key) {
    const float x = Memory<S>::load(src, i) * scale;
    if (Stochastic && D != F32) {
        const u32 random = random_32(key, i);
        static_cast<u16*>(dst)[i] = D == BF16 ? stochastic_bf16(x, random) : stochastic_f16(x, random);
    } else {
        Memory<D>::store(dst, i, x);
    }
}

template <int S, int D, bool Stochastic>
__global__ void cast_copy(const void* src, void* dst, i64 numel, float scale, u64 key) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 stride = i64(gridDim.x) * blockDim.x;
    const i64 groups = !Stochastic && aligned4<S>(src) && aligned4<D>(dst) ? numel / 4 : 0;
    for (i64 k = thread; k < groups; k += stride) {
        Four a = Memory<S>::load4(src, 4 * k);
#pragma unroll
        for (int j = 0; j < 4; ++j) a.x[j] = a.x[j] * scale;
        Memory<D>::store4(dst, 4 * k, a);
    }
    for (i64 i = 4 * groups + thread; i < numel; i += stride) cast_one<S, D, Stochastic>(src, dst, i, scale, key);
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(S, D)                                                                \
    template __global__ void cast_copy<S, D, false>(const void*, void*, i64, float, u64); \
    template __global__ void cast_copy<S, D, true>(const void*, void*, i64, float, u64);
INSTANTIATE(F32, F32) INSTANTIATE(F32, BF16) INSTANTIATE(F32, F16)
INSTANTIATE(BF16, F32) INSTANTIATE(BF16, BF16) INSTANTIATE(BF16, F16)
INSTANTIATE(F16, F32) INSTANTIATE(F16, BF16) INSTANTIATE(F16, F16)
#endif
