// Memory of one element type, read and written as fp32, one element or four at a time.
//
// Compiled by NVRTC without any header but these; bf16 and fp16 are handled as bits. The codes are those of DType in
// include/accel/kernels.h. Compile with -fmad=false: like the CPU code (Note [Same bits everywhere], cpu/simd.h), no
// product is fused with a sum, and divisions and roots are the correctly rounded ones, so results agree bit for bit.
#pragma once

using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned int;
using u16 = unsigned short;

enum { F32 = 0, BF16 = 1, F16 = 2, NONE = 3 };

struct Four {
    float x[4];
};

__device__ inline float bf16_to_float(u16 h) { return __uint_as_float(u32(h) << 16); }

__device__ inline u16 float_to_bf16(float x) {  // to nearest even; NaN becomes 0x7fc0
    const u32 u = __float_as_uint(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? u16(0x7fc0) : u16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

__device__ inline float f16_to_float(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

__device__ inline u16 float_to_f16(float x) {  // to nearest even
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

template <int T>
struct Memory {  // the 16-bit types; four of them are eight bytes
    static constexpr int kBytes = 2;

    __device__ static float widen(u16 h) { return T == BF16 ? bf16_to_float(h) : f16_to_float(h); }
    __device__ static u16 narrow(float x) { return T == BF16 ? float_to_bf16(x) : float_to_f16(x); }

    __device__ static float load(const void* p, i64 i) { return widen(static_cast<const u16*>(p)[i]); }
    __device__ static void store(void* p, i64 i, float x) { static_cast<u16*>(p)[i] = narrow(x); }
    __device__ static Four load4(const void* p, i64 i) {
        const ushort4 h = *reinterpret_cast<const ushort4*>(static_cast<const u16*>(p) + i);
        return {{widen(h.x), widen(h.y), widen(h.z), widen(h.w)}};
    }
    __device__ static void store4(void* p, i64 i, Four a) {
        *reinterpret_cast<ushort4*>(static_cast<u16*>(p) + i) =
            make_ushort4(narrow(a.x[0]), narrow(a.x[1]), narrow(a.x[2]), narrow(a.x[3]));
    }
};

template <>
struct Memory<F32> {
    static constexpr int kBytes = 4;

    __device__ static float load(const void* p, i64 i) { return static_cast<const float*>(p)[i]; }
    __device__ static void store(void* p, i64 i, float x) { static_cast<float*>(p)[i] = x; }
    __device__ static Four load4(const void* p, i64 i) {
        const float4 f = *reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
        return {{f.x, f.y, f.z, f.w}};
    }
    __device__ static void store4(void* p, i64 i, Four a) {
        *reinterpret_cast<float4*>(static_cast<float*>(p) + i) = make_float4(a.x[0], a.x[1], a.x[2], a.x[3]);
    }
};

// Whether four elements of T at a multiple of four may be read at once; null pointers are.
template <int T>
__device__ inline bool aligned4(const void* p) {
    return reinterpret_cast<u64>(p) % (4 * Memory<T>::kBytes) == 0;
}
