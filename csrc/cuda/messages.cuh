// Messages of quantized tensors, which may lie at any address: numbers read and written byte by byte where they must be,
// and sums of messages, four neighbours at a time. How a message lies in memory: accel_kernels/messages.py.
#pragma once
#include "random.cuh"

using Message = const unsigned char*;

// What a scale is where the input is not finite.
constexpr u32 kNaN = 0x7fc00000u;

__device__ inline float load_float(Message p) {
    if (reinterpret_cast<u64>(p) % 4 == 0) return *reinterpret_cast<const float*>(p);
    return __uint_as_float(u32(p[0]) | u32(p[1]) << 8 | u32(p[2]) << 16 | u32(p[3]) << 24);
}

// The lowest `bytes` bytes of x, at once where the address allows it.
template <int bytes>
__device__ inline void store_bytes(unsigned char* p, u32 x) {
    if (bytes == 4 && reinterpret_cast<u64>(p) % 4 == 0) {
        *reinterpret_cast<u32*>(p) = x;
    } else if (bytes == 2 && reinterpret_cast<u64>(p) % 2 == 0) {
        *reinterpret_cast<u16*>(p) = u16(x);
    } else {
        for (int k = 0; k < bytes; ++k) p[k] = (unsigned char)(x >> (8 * k));
    }
}

// How many messages one launch adds; more are added by several, through an fp32 buffer.
constexpr int kMessages = 8;

struct Messages {
    Message m[kMessages];
    int count;
};

// One to four neighbours of a tensor of floats.
template <int T>
__device__ inline Four load_some(const void* p, i64 i, int count, bool aligned) {
    if (count == 4 && aligned) return Memory<T>::load4(p, i);
    Four x = {{0.0f, 0.0f, 0.0f, 0.0f}};
    for (int k = 0; k < count; ++k) x.x[k] = Memory<T>::load(p, i + k);
    return x;
}

template <int T>
__device__ inline void store_some(void* p, i64 i, int count, bool aligned, Four x) {
    if (count == 4 && aligned) return Memory<T>::store4(p, i, x);
    for (int k = 0; k < count; ++k) Memory<T>::store(p, i + k, x.x[k]);
}

// Scaled sum of block-wise quantized messages, after `before` if that is not null; elements of one block at a time.
template <int Bits, bool Symmetric>
struct Sum {
    Messages messages;
    const float* before;
    i64 minima, values;  // where they begin in a message
    float scale;

    __device__ static float integer(Message p, i64 i) {
        if (Bits == 4) return float(int(p[i / 2] >> (4 * (i % 2)) & 15) - (Symmetric ? 8 : 0));
        return Symmetric ? float(reinterpret_cast<const signed char*>(p)[i]) : float(p[i]);
    }
    // Elements i and following, of block `block`.
    __device__ Four load(i64 i, int count, i64 block) const {
        Four sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (before != nullptr) sum = load_some<F32>(before, i, count, false);
        for (int m = 0; m < messages.count; ++m) {
            Message p = messages.m[m];
            const float step = load_float(p + 4 * block);
            const float minimum = Symmetric ? 0.0f : load_float(p + minima + 4 * block);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (k >= count) break;
                float x = integer(p + values, i + k) * step;
                if (!Symmetric) x = x + minimum;
                sum.x[k] = m == 0 && before == nullptr ? x : sum.x[k] + x;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.x[k] = sum.x[k] * scale;
        return sum;
    }
};
