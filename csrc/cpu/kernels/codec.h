// What the codecs need besides simd.h: rounding to integers, packing them to bytes and half bytes, masks of signs.
//
// A group is kGroup elements: four vectors, whose bytes fill one.
#pragma once
#include <algorithm>

#include "../simd.h"
#include "accel/codecs.h"

namespace {  // internal linkage: one copy per instruction set, never merged by the linker

constexpr int kGroup = 4 * kLanes;

#if ACCEL_LEVEL >= 2

using I32 = __m512i;

inline I32 nearest(F32 x) { return _mm512_cvtps_epi32(x); }  // ties to even
inline I32 downward(F32 x) { return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 splat_int(int x) { return _mm512_set1_epi32(x); }
inline F32 smaller(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 larger(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline I32 larger(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 magnitude_bits(F32 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
inline void store_ints(std::int32_t* p, I32 x) { _mm512_storeu_si512(p, x); }

inline F32 load_i8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline F32 load_u8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline F32 load_u16(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
}

// The bytes of a group in order: from the lanes of vectors back to the order of elements.
template <bool kSigned>
inline __m512i group_bytes(I32 a, I32 b, I32 c, I32 d) {
    const __m512i low = _mm512_packs_epi32(a, b), high = _mm512_packs_epi32(c, d);
    const __m512i bytes = kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    _mm512_storeu_si512(p, group_bytes<kSigned>(a, b, c, d));
}
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {  // 0 to 15 each
    const __m512i pairs = _mm512_maddubs_epi16(group_bytes<false>(a, b, c, d), _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(pairs));
}

// Half bytes by way of a table of the sixteen values that they stand for.
struct Nibbles {
    F32 table;
    Nibbles(float scale, float zero, float minimum, bool symmetric) {
        const F32 q = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        table = (q - splat(zero)) * splat(scale);
        if (!symmetric) table = table + splat(minimum);
    }
    F32 load(const std::uint8_t* p) const {  // kLanes elements
        const __m512i halves = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(halves, shifts), table);  // looks at the lowest four bits
    }
};

using Mask = __mmask16;
inline Mask not_negative(F32 x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline std::uint64_t mask_bits(Mask m) { return m; }
inline Mask bits_mask(std::uint64_t bits) { return Mask(bits); }
inline F32 choose(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }

#elif ACCEL_LEVEL == 1

using I32 = __m256i;

inline I32 nearest(F32 x) { return _mm256_cvtps_epi32(x); }
inline I32 downward(F32 x) { return _mm256_cvtps_epi32(_mm256_floor_ps(x)); }
inline I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 splat_int(int x) { return _mm256_set1_epi32(x); }
inline F32 smaller(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 larger(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline I32 larger(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline I32 magnitude_bits(F32 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
inline void store_ints(std::int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

inline F32 load_i8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline F32 load_u8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline F32 load_u16(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

template <bool kSigned>
inline __m256i group_bytes(I32 a, I32 b, I32 c, I32 d) {
    const __m256i low = _mm256_packs_epi32(a, b), high = _mm256_packs_epi32(c, d);
    const __m256i bytes = kSigned ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), group_bytes<kSigned>(a, b, c, d));
}
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {
    const __m256i pairs = _mm256_maddubs_epi16(group_bytes<false>(a, b, c, d), _mm256_set1_epi16(0x1001));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

struct Nibbles {
    F32 scale, zero, minimum;
    bool symmetric;
    Nibbles(float s, float z, float m, bool is_symmetric)
        : scale(splat(s)), zero(splat(z)), minimum(splat(m)), symmetric(is_symmetric) {}
    F32 load(const std::uint8_t* p) const {
        std::int32_t eight;
        std::memcpy(&eight, p, sizeof eight);
        const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const F32 q = _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)));
        const F32 x = (q - zero) * scale;
        return symmetric ? x : x + minimum;
    }
};

using Mask = __m256;  // lanes of all ones
inline Mask not_negative(F32 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ); }
inline std::uint64_t mask_bits(Mask m) { return std::uint64_t(unsigned(_mm256_movemask_ps(m))); }
inline Mask bits_mask(std::uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits & 0xff)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
}
inline F32 choose(Mask m, F32 yes, F32 no) { return _mm256_blendv_ps(no, yes, m); }

#else

typedef std::int32_t I32 __attribute__((vector_size(16)));

inline I32 splat_int(int x) { return I32{x, x, x, x}; }
inline I32 nearest(F32 x) {  // |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction, and rounds as addition does
    const F32 shift = splat(12582912.0f);
    return __builtin_convertvector((x + shift) - shift, I32);
}
inline I32 downward(F32 x) {
    const I32 towards_zero = __builtin_convertvector(x, I32);
    return towards_zero + (__builtin_convertvector(towards_zero, F32) > x);  // -1 where that was upwards
}
inline I32 add(I32 a, I32 b) { return a + b; }
inline F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline I32 larger(I32 a, I32 b) { return a > b ? a : b; }
inline I32 magnitude_bits(F32 x) {
    I32 u;
    std::memcpy(&u, &x, sizeof u);
    return u & splat_int(0x7fffffff);
}
inline void store_ints(std::int32_t* p, I32 x) { std::memcpy(p, &x, sizeof x); }

template <class T>
inline F32 load_integers(const void* p) {
    T q[kLanes];
    std::memcpy(q, p, sizeof q);
    return F32{float(q[0]), float(q[1]), float(q[2]), float(q[3])};
}
inline F32 load_i8(const void* p) { return load_integers<std::int8_t>(p); }
inline F32 load_u8(const void* p) { return load_integers<std::uint8_t>(p); }
inline F32 load_u16(const void* p) { return load_integers<std::uint16_t>(p); }

template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    std::uint8_t bytes[kGroup];
    for (int k = 0; k < kLanes; ++k) {
        bytes[k] = std::uint8_t(a[k]);
        bytes[k + kLanes] = std::uint8_t(b[k]);
        bytes[k + 2 * kLanes] = std::uint8_t(c[k]);
        bytes[k + 3 * kLanes] = std::uint8_t(d[k]);
    }
    std::memcpy(p, bytes, sizeof bytes);
}
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {
    std::uint8_t bytes[kGroup], pairs[kGroup / 2];
    store_bytes<false>(bytes, a, b, c, d);
    for (int k = 0; k < kGroup / 2; ++k) pairs[k] = std::uint8_t(bytes[2 * k] | (bytes[2 * k + 1] << 4));
    std::memcpy(p, pairs, sizeof pairs);
}

struct Nibbles {
    F32 scale, zero, minimum;
    bool symmetric;
    Nibbles(float s, float z, float m, bool is_symmetric)
        : scale(splat(s)), zero(splat(z)), minimum(splat(m)), symmetric(is_symmetric) {}
    F32 load(const std::uint8_t* p) const {
        const F32 q = {float(p[0] & 15), float(p[0] >> 4), float(p[1] & 15), float(p[1] >> 4)};
        const F32 x = (q - zero) * scale;
        return symmetric ? x : x + minimum;
    }
};

using Mask = I32;  // lanes of all ones
inline Mask not_negative(F32 x) { return x >= F32{}; }
inline std::uint64_t mask_bits(Mask m) {
    const I32 bit = m & I32{1, 2, 4, 8};
    return std::uint64_t(bit[0] | bit[1] | bit[2] | bit[3]);
}
inline Mask bits_mask(std::uint64_t bits) {
    const I32 lane = {1, 2, 4, 8};
    return (splat_int(int(bits & 15)) & lane) == lane;
}
inline F32 choose(Mask m, F32 yes, F32 no) { return m ? yes : no; }

#endif

inline float load_float(const std::uint8_t* p) {  // at any address
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store_float(std::uint8_t* p, float x) { std::memcpy(p, &x, sizeof x); }

constexpr std::uint32_t kNaN = 0x7fc00000u;  // what a scale is where the input is not finite

// Floats to memory of type T, `count` of them; streamed, past the caches, where that is wanted and dst allows it.
template <DType T>
void write_floats(const float* x, typename Memory<T>::Element* dst, std::int64_t count, bool stream) {
    using Element = typename Memory<T>::Element;
    std::int64_t i = 0;
    if (stream) {
        const std::int64_t head = std::min(elements_to_alignment(dst), count);
        while (i < head) {
            alignas(64) float in[kLanes] = {};
            alignas(64) Element out[kLanes];
            const std::int64_t some = std::min<std::int64_t>(head - i, kLanes);
            std::memcpy(in, x + i, std::size_t(some) * sizeof(float));
            Memory<T>::store(out, load_f32(in));
            std::memcpy(dst + i, out, std::size_t(some) * sizeof(Element));
            i += some;
        }
        for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
            Memory<T>::stream2(dst + i, load_f32(x + i), load_f32(x + i + kLanes));
        }
    }
    for (; i + kLanes <= count; i += kLanes) Memory<T>::store(dst + i, load_f32(x + i));
    if (i < count) {
        alignas(64) float in[kLanes] = {};
        alignas(64) Element out[kLanes];
        std::memcpy(in, x + i, std::size_t(count - i) * sizeof(float));
        Memory<T>::store(out, load_f32(in));
        std::memcpy(dst + i, out, std::size_t(count - i) * sizeof(Element));
    }
}

// The same by a dtype known when it runs; dst is the first element of the whole array.
inline void write_floats(const float* x, void* dst, DType dtype, std::int64_t begin, std::int64_t count, bool stream) {
    auto* narrow = static_cast<std::uint16_t*>(dst) + begin;
    switch (dtype) {
        case DType::bf16: return write_floats<DType::bf16>(x, narrow, count, stream);
        case DType::f16: return write_floats<DType::f16>(x, narrow, count, stream);
        default: return write_floats<DType::f32>(x, static_cast<float*>(dst) + begin, count, stream);
    }
}

}  // namespace
