// What the inference kernels need beyond simd.h: fused multiply-add, sums over lanes, exponentials, partial vectors.
//
// Note [Own row, own bits]
// A result depends on its own row of activations alone: the order in which its terms are added is written out here and
// in the kernels, products are fused where fma() says so and nowhere else, and blocking changes which results are
// computed side by side, never how one is computed. Instruction sets differ in their lanes, so they agree to rounding.
#pragma once
#include <algorithm>

#include "../simd.h"
#include "accel/inference.h"

namespace {

#if ACCEL_LEVEL >= 2
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 maximum(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // NaN in b stays
inline F32 load_part(const float* p, int count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
}
inline float sum_lanes(F32 x) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float max_lanes(F32 x) { return _mm512_reduce_max_ps(x); }
inline F32 load_i8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// 16 bytes of 32 four-bit elements: the low halves (elements 0, 2, 4, ...), then the high ones.
inline void load_i4(const std::uint8_t* p, F32* low, F32* high) {
    const U32 wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    *low = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    *high = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}
inline F32 iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline F32 where_between(F32 x, F32 low, F32 high, F32 yes, F32 no) {  // low <= x < high
    const __mmask16 in = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LT_OQ);
    return _mm512_mask_mov_ps(no, in, yes);
}
// 2^n * p for whole n.
inline F32 scale_by_power(F32 p, F32 n) { return _mm512_scalef_ps(p, n); }
inline F32 round_even(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 zero_below(F32 x, F32 limit, F32 value) {  // value, but 0 where x < limit
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
}
inline F32 absolute(F32 x) { return _mm512_abs_ps(x); }

#elif ACCEL_LEVEL == 1
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 maximum(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 load_part(const float* p, int count) {
    alignas(32) float padded[8] = {};
    std::memcpy(padded, p, std::size_t(count) * 4);
    return _mm256_load_ps(padded);
}
inline float sum_lanes(F32 x) {
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float max_lanes(F32 x) {
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
inline F32 load_i8(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void load_i4(const std::uint8_t* p, F32* low, F32* high) {
    const U32 wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    *low = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
    *high = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}
inline F32 iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline F32 where_between(F32 x, F32 low, F32 high, F32 yes, F32 no) {
    const F32 in = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ));
    return _mm256_blendv_ps(no, yes, in);
}
inline F32 scale_by_power(F32 p, F32 n) {  // in two steps, so that 2^n need not be normal
    const U32 whole = _mm256_cvtps_epi32(n);
    const U32 half = _mm256_srai_epi32(whole, 1);
    const auto power = [](U32 e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return (p * power(half)) * power(_mm256_sub_epi32(whole, half));
}
inline F32 round_even(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 zero_below(F32 x, F32 limit, F32 value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
}
inline F32 absolute(F32 x) { return _mm256_andnot_ps(splat(-0.0f), x); }

#else
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 maximum(F32 a, F32 b) {
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
inline F32 load_part(const float* p, int count) {
    float padded[kLanes] = {};
    std::memcpy(padded, p, std::size_t(count) * 4);
    return load_f32(padded);
}
inline float sum_lanes(F32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float max_lanes(F32 x) { return std::max(std::max(x[0], x[2]), std::max(x[1], x[3])); }
inline F32 load_i8(const std::int8_t* p) { return F32{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline void load_i4(const std::uint8_t* p, F32* low, F32* high) {
    for (int i = 0; i < kLanes; ++i) {
        (*low)[i] = float(p[i] & 15);
        (*high)[i] = float(p[i] >> 4);
    }
}
inline F32 iota() { return F32{0, 1, 2, 3}; }
inline F32 where_between(F32 x, F32 low, F32 high, F32 yes, F32 no) {
    for (int i = 0; i < kLanes; ++i) no[i] = x[i] >= low[i] && x[i] < high[i] ? yes[i] : no[i];
    return no;
}
inline F32 scale_by_power(F32 p, F32 n) {
    for (int i = 0; i < kLanes; ++i) p[i] = std::ldexp(p[i], int(n[i]));
    return p;
}
inline F32 round_even(F32 x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::nearbyint(x[i]);
    return x;
}
inline F32 zero_below(F32 x, F32 limit, F32 value) {
    for (int i = 0; i < kLanes; ++i) value[i] = x[i] < limit[i] ? 0.0f : value[i];
    return value;
}
inline F32 absolute(F32 x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::fabs(x[i]);
    return x;
}
#endif

inline F32 zero_f32() { return splat(0.0f); }

// The sums over lanes of Count vectors, each with the bits of sum_lanes, in the first lanes; zeros in the others.
template <int Count>
inline F32 sum_lanes_of(const F32* x) {
#if ACCEL_LEVEL >= 2
    if constexpr (Count == 8) {
        const auto four = [](const F32* v) {  // in element 0 of each quarter
            const F32 ab = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xee);
            const F32 cd = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xee);
            const F32 z = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
            const F32 pairs = z + _mm512_permute_ps(z, 0x4e);
            return pairs + _mm512_movehdup_ps(pairs);
        };
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        return _mm512_maskz_permutex2var_ps(0xff, four(x), order, four(x + 4));
    }
#endif
    float sums[kLanes] = {};
    static_assert(Count <= kLanes);
    for (int i = 0; i < Count; ++i) sums[i] = sum_lanes(x[i]);
    return load_f32(sums);
}

// e^x for x <= 0 to a unit or two in the last place; 0 below -87, where the result would be subnormal; NaN stays.
inline F32 exponential_below_zero(F32 x) {
    const F32 lowest = splat(-87.0f), bounded = maximum(lowest, x);
    const F32 n = round_even(bounded * splat(1.44269504f));
    const F32 r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), bounded));  // ln 2 in two parts
    // Taylor's series to r^7; |r| <= ln(2) / 2, so what is left out is below 2^-27.
    F32 p = splat(1.0f / 5040.0f);
    p = fma(p, r, splat(1.0f / 720.0f));
    p = fma(p, r, splat(1.0f / 120.0f));
    p = fma(p, r, splat(1.0f / 24.0f));
    p = fma(p, r, splat(1.0f / 6.0f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return zero_below(x, lowest, scale_by_power(p, n));
}

// The same for any x; infinite above 88.
inline F32 exponential(F32 x) {
    const F32 e = exponential_below_zero(zero_f32() - absolute(x));
    return where_between(x, splat(-INFINITY), zero_f32(), e, splat(1.0f) / e);
}

// tanh through e^(-2|x|): absolute error about 1e-7.
inline F32 hyperbolic_tangent(F32 x) {
    const F32 t = exponential_below_zero(splat(-2.0f) * absolute(x));
    const F32 magnitude = (splat(1.0f) - t) / (splat(1.0f) + t);
    return where_between(x, splat(-INFINITY), zero_f32(), zero_f32() - magnitude, magnitude);
}

// Elements of one type, whole vectors or fewer, as fp32.
template <DType T>
inline F32 load_few(const typename Memory<T>::Element* p, int count) {
    typename Memory<T>::Element padded[kLanes] = {};
    std::memcpy(padded, p, std::size_t(count) * sizeof *p);
    return Memory<T>::load(padded);
}
template <DType T>
inline void store_few(typename Memory<T>::Element* p, F32 x, int count) {
    typename Memory<T>::Element padded[kLanes];
    Memory<T>::store(padded, x);
    std::memcpy(p, padded, std::size_t(count) * sizeof *p);
}

// Calls body(i, count) for whole vectors, then once for what is left of n elements.
template <class Body>
inline void for_vectors(std::int64_t n, Body body) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>());
    if (i < n) body(i, int(n - i));
}
template <DType T>
inline F32 load_at(const typename Memory<T>::Element* p, std::integral_constant<int, kLanes>) {
    return Memory<T>::load(p);
}
template <DType T>
inline F32 load_at(const typename Memory<T>::Element* p, int count) {
    return load_few<T>(p, count);
}
template <DType T>
inline void store_at(typename Memory<T>::Element* p, F32 x, std::integral_constant<int, kLanes>) {
    Memory<T>::store(p, x);
}
template <DType T>
inline void store_at(typename Memory<T>::Element* p, F32 x, int count) {
    store_few<T>(p, x, count);
}

}  // namespace
