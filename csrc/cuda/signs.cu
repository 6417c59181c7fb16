// Signs with one scale, and what they lose. The arithmetic of cpu/kernels/signs.cpp; Note [Order of the sum],
// accel_kernels/reference/signs.py.
#include "messages.cuh"

constexpr int kThreads = 256;
constexpr int kSumLanes = 32;  // a warp's threads
constexpr int kPiece = 4096;
constexpr int kScaleBytes = 4;

template <int S, bool Error>
__device__ inline float compensated(const void* src, const float* error, i64 i) {
    const float x = Memory<S>::load(src, i);
    return Error ? x + error[i] : x;
}

// One warp a piece.
template <int S, bool Error, bool Squared>
__global__ void sign_sums(const void* src, const float* error, i64 numel, double* sums) {
    const i64 pieces = (numel + kPiece - 1) / kPiece;
    const int lane = threadIdx.x % kSumLanes;
    constexpr int kWarps = kThreads / kSumLanes;
    for (i64 piece = i64(blockIdx.x) * kWarps + threadIdx.x / kSumLanes; piece < pieces; piece += i64(gridDim.x) * kWarps) {
        const i64 begin = piece * kPiece, end = numel - begin < kPiece ? numel : begin + kPiece;
        double sum = 0.0;
#pragma unroll 8
        for (i64 i = begin + lane; i < end; i += kSumLanes) {
            const double wide = double(compensated<S, Error>(src, error, i));
            sum += Squared ? wide * wide : fabs(wide);
        }
        for (int half = kSumLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
        if (lane == 0) sums[piece] = sum;
    }
}

// One CUDA block: adds the pieces' sums in halves, and writes the scale.
__global__ void sign_scale(double* sums, i64 pieces, i64 numel, int squared, unsigned char* message) {
    i64 width = 1, left = pieces;
    while (width < pieces) width *= 2;
    for (width /= 2; width > 0; width /= 2) {
        for (i64 k = threadIdx.x; k < width && k + width < left; k += kThreads) sums[k] += sums[k + width];
        left = left < width ? left : width;
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    const double mean = __ddiv_rn(sums[0], double(numel));
    const float scale = __double2float_rn(squared != 0 ? __dsqrt_rn(mean) : mean);
    const bool finite = (__float_as_uint(scale) & 0x7fffffffu) < 0x7f800000u;
    store_bytes<4>(message, finite ? __float_as_uint(scale) : kNaN);
}

// A warp makes 32 bits at a time.
template <int S, bool Error>
__global__ void pack_signs(const void* src, float* error, unsigned char* message, i64 numel) {
    const float scale = load_float(message);
    const bool finite = (__float_as_uint(scale) & 0x7fffffffu) < 0x7f800000u;
    const i64 warps = i64(gridDim.x) * (kThreads / 32), groups = (numel + 31) / 32;
    const int lane = threadIdx.x % 32;
    for (i64 group = (i64(blockIdx.x) * kThreads + threadIdx.x) / 32; group < groups; group += warps) {
        const i64 i = 32 * group + lane;
        const float c = i < numel ? compensated<S, Error>(src, error, i) : -1.0f;
        const bool positive = c >= 0.0f;
        const u32 bits = __ballot_sync(0xffffffffu, positive);
        if (Error && finite && i < numel) error[i] = c - (positive ? scale : -scale);
        if (lane < 4 && 32 * group + 8 * lane < numel) message[kScaleBytes + 4 * group + lane] = (unsigned char)(bits >> (8 * lane));
    }
}

template <int D>
__global__ void mean_signs(Message m0, Message m1, Message m2, Message m3, Message m4, Message m5, Message m6, Message m7,
                           int count, const float* before, float factor, void* out, i64 numel) {
    const Messages messages{{m0, m1, m2, m3, m4, m5, m6, m7}, count};
    const bool aligned = aligned4<D>(out);
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, stride = i64(gridDim.x) * blockDim.x;
    for (i64 i = 4 * thread; i < numel; i += 4 * stride) {
        const int left = numel - i < 4 ? int(numel - i) : 4;
        Four sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (before != nullptr) sum = load_some<F32>(before, i, left, false);
        for (int m = 0; m < count; ++m) {
            const float scale = load_float(messages.m[m]);
            const u32 bits = messages.m[m][kScaleBytes + i / 8] >> (i % 8);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float x = (bits >> k & 1u) != 0 ? scale : -scale;
                sum.x[k] = m == 0 && before == nullptr ? x : sum.x[k] + x;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.x[k] = sum.x[k] * factor;
        store_some<D>(out, i, left, aligned, sum);
    }
}

#ifndef __CUDACC_RTC__
#define INSTANTIATE(S)                                                                                             \
    template __global__ void sign_sums<S, true, true>(const void*, const float*, i64, double*);                    \
    template __global__ void sign_sums<S, true, false>(const void*, const float*, i64, double*);                   \
    template __global__ void sign_sums<S, false, true>(const void*, const float*, i64, double*);                   \
    template __global__ void sign_sums<S, false, false>(const void*, const float*, i64, double*);                  \
    template __global__ void pack_signs<S, true>(const void*, float*, unsigned char*, i64);                        \
    template __global__ void pack_signs<S, false>(const void*, float*, unsigned char*, i64);                       \
    template __global__ void mean_signs<S>(Message, Message, Message, Message, Message, Message, Message, Message, \
                                           int, const float*, float, void*, i64);
INSTANTIATE(F32) INSTANTIATE(BF16) INSTANTIATE(F16)
#endif
