// The few vector operations the kernels need, for the instruction set of this translation unit.
//
// F32 is a native vector of kLanes floats: + - * / are the compiler's own, and only what has no operator is a
// function here. ACCEL_LEVEL (0 baseline, 1 AVX2 + F16C, 2 AVX-512 F/BW/DQ/VL; for
// inference also 3 AMX) comes from CMakeLists.txt.
//
// Note [Same bits everywhere]
// Products and sums are never fused (-ffp-contract=off), divisions and square roots are the correctly rounded
// ones, and head and tail of a range go through the same vector code as its middle. An element's result
// therefore depends on neither thread count, alignment nor instruction set, and equals the plain torch reference.
#pragma once
#if ACCEL_LEVEL > 0
#include <immintrin.h>
#endif

#include <cmath>
#include <limits>

#include "accel/kernels.h"
#include "scalar.h"

namespace {  // internal linkage: one copy per instruction set, never merged by the linker

using accel::DType;

#if ACCEL_LEVEL >= 2

using F32 = __m512;
using U32 = __m512i;
constexpr int kLanes = 16;

inline F32 splat(float x) { return _mm512_set1_ps(x); }
inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }
inline F32 sign(F32 x) {  // -1, 0, 1; 0 for NaN, like torch.sign
    const F32 zero = _mm512_setzero_ps();
    const F32 positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), splat(1.0f));
    return _mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), splat(-1.0f));
}
inline F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f32(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void stream_f32(float* p, F32 x) { _mm512_stream_ps(p, x); }
inline F32 load_bf16(const void* p) {
    const U32 wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
using Half = __m256i;  // kLanes 16-bit values
inline Half to_bf16(F32 x) {  // by integer arithmetic: the bf16 instruction would flush subnormals
    const U32 u = _mm512_castps_si512(x);
    const U32 odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const U32 rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
inline Half to_f16(F32 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_half(void* p, Half x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
// Two vectors at a time make a whole cache line, which is what a streaming store wants.
inline void stream_half2(void* p, Half a, Half b) {
    _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

#elif ACCEL_LEVEL == 1

using F32 = __m256;
using U32 = __m256i;
constexpr int kLanes = 8;

inline F32 splat(float x) { return _mm256_set1_ps(x); }
inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }
inline F32 sign(F32 x) {
    const F32 zero = _mm256_setzero_ps();
    const F32 positive = _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_GT_OQ), splat(1.0f));
    return _mm256_or_ps(positive, _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_LT_OQ), splat(-1.0f)));
}
inline F32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline void stream_f32(float* p, F32 x) { _mm256_stream_ps(p, x); }
inline F32 load_bf16(const void* p) {
    const U32 wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
using Half = __m128i;
inline Half to_bf16(F32 x) {
    const U32 u = _mm256_castps_si256(x);
    const U32 odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const U32 rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const U32 nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const U32 chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
inline Half to_f16(F32 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_half(void* p, Half x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline void stream_half2(void* p, Half a, Half b) {
    _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_set_m128i(b, a));
}

#else

typedef float F32 __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline F32 splat(float x) { return F32{x, x, x, x}; }
inline F32 square_root(F32 x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
}
inline F32 sign(F32 x) {
    for (int i = 0; i < kLanes; ++i) x[i] = float((x[i] > 0.0f) - (x[i] < 0.0f));
    return x;
}
inline F32 load_f32(const float* p) {
    F32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store_f32(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
inline void stream_f32(float* p, F32 x) { store_f32(p, x); }
struct Half {
    std::uint16_t lane[kLanes];
};
inline F32 load_bf16(const void* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    F32 x;
    for (int i = 0; i < kLanes; ++i) x[i] = bf16_to_float(h.lane[i]);
    return x;
}
inline F32 load_f16(const void* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    F32 x;
    for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(h.lane[i]);
    return x;
}
inline Half to_bf16(F32 x) {
    Half h;
    for (int i = 0; i < kLanes; ++i) h.lane[i] = float_to_bf16(x[i]);
    return h;
}
inline Half to_f16(F32 x) {
    Half h;
    for (int i = 0; i < kLanes; ++i) h.lane[i] = float_to_f16(x[i]);
    return h;
}
inline void store_half(void* p, Half x) { std::memcpy(p, &x, sizeof x); }
inline void stream_half2(void* p, Half a, Half b) {
    store_half(p, a);
    store_half(static_cast<char*>(p) + sizeof a, b);
}

#endif

constexpr int kStreamAlign = 4 * kLanes;  // bytes; both a vector of floats and a pair of 16-bit vectors

inline void stream_fence() {  // streaming stores are ordered with nothing else until fenced
#if ACCEL_LEVEL > 0
    _mm_sfence();
#endif
}

// Memory of one element type, read and written as fp32 vectors.
template <DType T>
struct Memory;

template <>
struct Memory<DType::f32> {
    using Element = float;
    static F32 load(const float* p) { return load_f32(p); }
    static void store(float* p, F32 x) { store_f32(p, x); }
    static void stream2(float* p, F32 a, F32 b) {
        stream_f32(p, a);
        stream_f32(p + kLanes, b);
    }
};

template <>
struct Memory<DType::bf16> {
    using Element = std::uint16_t;
    static F32 load(const std::uint16_t* p) { return load_bf16(p); }
    static void store(std::uint16_t* p, F32 x) { store_half(p, to_bf16(x)); }
    static void stream2(std::uint16_t* p, F32 a, F32 b) { stream_half2(p, to_bf16(a), to_bf16(b)); }
};

template <>
struct Memory<DType::f16> {
    using Element = std::uint16_t;
    static F32 load(const std::uint16_t* p) { return load_f16(p); }
    static void store(std::uint16_t* p, F32 x) { store_half(p, to_f16(x)); }
    static void stream2(std::uint16_t* p, F32 a, F32 b) { stream_half2(p, to_f16(a), to_f16(b)); }
};

// Elements from p to the next address that a streaming store accepts; more than any tensor has where none ever comes,
// since p lies between elements.
template <class T>
inline std::int64_t elements_to_alignment(const T* p) {
    const auto past = reinterpret_cast<std::uintptr_t>(p) % kStreamAlign;
    if (past % sizeof(T) != 0) return std::numeric_limits<std::int64_t>::max();
    return past == 0 ? 0 : std::int64_t((kStreamAlign - past) / sizeof(T));
}

}  // namespace
