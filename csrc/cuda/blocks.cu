// Block-wise quantization: floats, or sums of messages, into messages and back. The arithmetic of cpu/kernels/blocks.cpp.
//
// A block of a message belongs to a team of threads, a warp or (where blocks are long) all of a CUDA block: it finds the
// extremes, then reads its elements again, which the first-level cache still has, and rounds them, four at a time.
#include "messages.cuh"

constexpr int kThreads = 256;

struct Extent {
    u32 bits;  // of the largest magnitude: as integers these order like the numbers, and NaN comes last
    float low, high;
};

__device__ inline void merge(Extent& a, u32 bits, float low, float high) {
    a.bits = bits > a.bits ? bits : a.bits;
    a.low = low < a.low ? low : a.low;
    a.high = high > a.high ? high : a.high;
}

// The extremes over the team, in every thread.
template <int Team>
__device__ inline Extent team_extent(Extent mine) {
    for (int width = 16; width > 0; width /= 2) {
        merge(mine, __shfl_xor_sync(0xffffffffu, mine.bits, width), __shfl_xor_sync(0xffffffffu, mine.low, width),
              __shfl_xor_sync(0xffffffffu, mine.high, width));
    }
    if (Team == 32) return mine;
    __shared__ Extent shared[kThreads / 32];
    __syncthreads();  // an earlier result may still be being read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int k = 0; k < kThreads / 32; ++k) merge(mine, shared[k].bits, shared[k].low, shared[k].high);
    return mine;
}

// Floats as a source of elements.
template <int S>
struct Floats {
    const void* src;
    bool aligned;
    __device__ Four load(i64 i, int count, i64) const { return load_some<S>(src, i, count, aligned); }
};

template <int Bits, bool Symmetric, bool Stochastic>
struct Rounding {
    static constexpr int kHighest = (1 << (Bits - (Symmetric ? 1 : 0))) - 1;
    static constexpr int kLowest = Symmetric ? -kHighest : 0;
    float inverse, minimum;
    u64 key;

    __device__ int operator()(float x, i64 i) const {
        float y = (Symmetric ? x : x - minimum) * inverse;
        if (!Stochastic) return __float2int_rn(y);
        y = y < float(kLowest) ? float(kLowest) : y > float(kHighest) ? float(kHighest) : y;
        const u32 random = u32(random_64(key, i / 4) >> (16 * (i % 4))) & 0xffffu;
        return __float2int_rd(y + float(random) * 0x1p-16f);
    }
};

template <int Bits, bool Symmetric, bool Stochastic, int Team, class Source>
__device__ inline void quantize_blocks(const Source& source, unsigned char* out, i64 numel, i64 block_size, i64 minima,
                                       i64 values, u64 key) {
    using Round = Rounding<Bits, Symmetric, Stochastic>;
    constexpr int kTeams = kThreads / Team;
    const i64 blocks = (numel + block_size - 1) / block_size;
    const int member = threadIdx.x % Team;
    // Teams of a warp leave one by one; a team that is the CUDA block leaves as a whole.
    for (i64 block = i64(blockIdx.x) * kTeams + threadIdx.x / Team; block < blocks; block += i64(gridDim.x) * kTeams) {
        const i64 begin = block * block_size;
        const i64 run = numel - begin < block_size ? numel - begin : block_size;
        Extent extent = {0u, __uint_as_float(0x7f800000u), __uint_as_float(0xff800000u)};
        for (i64 i = 4 * member; i < run; i += 4 * Team) {
            const int count = run - i < 4 ? int(run - i) : 4;
            const Four x = source.load(begin + i, count, block);
            for (int k = 0; k < count; ++k) merge(extent, __float_as_uint(x.x[k]) & 0x7fffffffu, x.x[k], x.x[k]);
        }
        extent = team_extent<Team>(extent);
        const float low = extent.low + 0.0f;  // -0 becomes 0
        const float reach = Symmetric ? __uint_as_float(extent.bits) : extent.high - low;
        const bool finite = extent.bits < 0x7f800000u && (__float_as_uint(reach) & 0x7fffffffu) < 0x7f800000u;
        float scale = __fdiv_rn(reach, float(Round::kHighest));
        scale = scale < 0x1p-126f ? 0x1p-126f : scale;
        if (member == 0) {
            store_bytes<4>(out + 4 * block, finite ? __float_as_uint(scale) : kNaN);
            if (!Symmetric) store_bytes<4>(out + minima + 4 * block, finite ? __float_as_uint(low) : kNaN);
        }
        const Round round{__fdiv_rn(1.0f, scale), low, key};
        for (i64 i = 4 * member; i < run; i += 4 * Team) {
            const int count = run - i < 4 ? int(run - i) : 4;
            const Four x = source.load(begin + i, count, block);
            u32 packed = 0;
            for (int k = 0; k < count; ++k) {
                const int q = (finite ? round(x.x[k], begin + i + k) : 0) + (Bits == 4 && Symmetric ? 8 : 0);
                packed |= (u32(q) & ((1u << Bits) - 1u)) << (Bits * k);
            }
            unsigned char* place = out + values + (begin + i) * Bits / 8;
            if (count == 4) {
                store_bytes<Bits / 2>(place, packed);
            } else {
                for (int k = 0; k < (count * Bits + 7) / 8; ++k) place[k] = (unsigned char)(packed >> (8 * k));
            }
        }
    }
}

template <int S, int Bits, bool Symmetric, bool Stochastic, int Team>
__global__ void quantize(const void* src, unsigned char* out, i64 numel, i64 block_size, i64 minima, i64 values, u64 key) {
    const Floats<S> source{src, aligned4<S>(src) && block_size % 4 == 0};
    quantize_blocks<Bits, Symmetric, Stochastic, Team>(source, out, numel, block_size, minima, values, key);
}

template <int In, int Bits, bool Symmetric, bool Stochastic, int Team>
__global__ void requantize_sum(Message m0, Message m1, Message m2, Message m3, Message m4, Message m5, Message m6,
                               Message m7, int count, const float* before, float scale, i64 in_minima, i64 in_values,
                               unsigned char* out, i64 numel, i64 block_size, i64 minima, i64 values, u64 key) {
    const Sum<In, Symmetric> source{{{m0, m1, m2, m3, m4, m5, m6, m7}, count}, before, in_minima, in_values, scale};
    quantize_blocks<Bits, Symmetric, Stochastic, Team>(source, out, numel, block_size, minima, values, key);
}

template <int D, int Bits, bool Symmetric>
__global__ void dequantize_sum(Message m0, Message m1, Message m2, Message m3, Message m4, Message m5, Message m6,
                               Message m7, int count, const float* before, float scale, i64 minima, i64 values,
                               void* out, i64 numel, i64 block_size) {
    const Sum<Bits, Symmetric> sum{{{m0, m1, m2, m3, m4, m5, m6, m7}, count}, before, minima, values, scale};
    const bool aligned = aligned4<D>(out);
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, stride = i64(gridDim.x) * blockDim.x;
    for (i64 i = 4 * thread; i < numel; i += 4 * stride) {
        const int left = numel - i < 4 ? int(numel - i) : 4;
        const i64 block = i / block_size;
        if (i + left <= (block + 1) * block_size) {
            store_some<D>(out, i, left, aligned, sum.load(i, left, block));
        } else {
            for (int k = 0; k < left; ++k) Memory<D>::store(out, i + k, sum.load(i + k, 1, (i + k) / block_size).x[0]);
        }
    }
}

#ifndef __CUDACC_RTC__
// Each value of each parameter, not each combination: those are NVRTC's.
#define QUANTIZE(...) template __global__ void quantize<__VA_ARGS__>(const void*, unsigned char*, i64, i64, i64, i64, u64);
QUANTIZE(F32, 8, true, false, 32) QUANTIZE(BF16, 8, false, true, 256)
QUANTIZE(F16, 4, true, true, 32) QUANTIZE(F32, 4, false, false, 256)
#define SUM Message, Message, Message, Message, Message, Message, Message, Message, int, const float*, float, i64, i64
#define REQUANTIZE(...) \
    template __global__ void requantize_sum<__VA_ARGS__>(SUM, unsigned char*, i64, i64, i64, i64, u64);
REQUANTIZE(8, 8, true, false, 32) REQUANTIZE(4, 4, false, true, 256) REQUANTIZE(8, 4, true, true, 32)
#define DEQUANTIZE(...) template __global__ void dequantize_sum<__VA_ARGS__>(SUM, void*, i64, i64);
DEQUANTIZE(F32, 8, true) DEQUANTIZE(BF16, 8, false) DEQUANTIZE(F16, 4, true) DEQUANTIZE(F32, 4, false)
#endif
