// codec.h for AVX-512.
#pragma once

namespace {

using I32 = __m512i;

inline I32 nearest(F32 x) { return _mm512_cvtps_epi32(x); }  // ties to even
inline I32 downward(F32 x) { return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 splat_int(int x) { return _mm512_set1_epi32(x); }
inline F32 smaller(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 larger(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline I32 larger(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 magnitude_bits(F32 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
inline F32 larger_magnitude(F32 a, F32 b) { return _mm512_range_ps(a, b, 11); }  // of two numbers, without its sign
inline std::uint32_t largest(I32 x) { return std::uint32_t(_mm512_reduce_max_epi32(x)); }  // not negative
inline I32 magnitudes_16(const void* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff)); }
inline I32 larger_16(I32 a, I32 b) { return _mm512_max_epi16(a, b); }
inline std::uint32_t largest_16(I32 x) {
    return largest(larger(_mm512_and_si512(x, splat_int(0xffff)), _mm512_srli_epi32(x, 16)));
}
inline float smallest(F32 x) { return _mm512_reduce_min_ps(x); }
inline float largest(F32 x) { return _mm512_reduce_max_ps(x); }

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

// Half bytes as they were quantized, looked up among the sixteen values that they stand for.
template <bool kSymmetric>
struct Nibbles {
    F32 table;
    Nibbles(float scale, float minimum) {
        const int z = kSymmetric ? 8 : 0;
        const F32 q = _mm512_setr_ps(0 - z, 1 - z, 2 - z, 3 - z, 4 - z, 5 - z, 6 - z, 7 - z, 8 - z, 9 - z, 10 - z, 11 - z,
                                     12 - z, 13 - z, 14 - z, 15 - z);
        table = kSymmetric ? q * splat(scale) : q * splat(scale) + splat(minimum);
    }
    F32 load(const std::uint8_t* p) const {  // kLanes elements
        const __m512i halves = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(halves, shifts), table);  // looks at the lowest four bits
    }
    // Every eighth of kNibbleStride elements, from the T-th on: cheaper than neighbours, and where no one sees the order
    // as good (requantize.cpp).
    template <int T>
    F32 load_strided(const std::uint8_t* p) const {
        const __m512i eights = _mm512_loadu_si512(p);
        return _mm512_permutexvar_ps(T == 0 ? eights : _mm512_srli_epi32(eights, 4 * T), table);
    }
};
constexpr int kNibbleStride = 8 * kLanes;

// q[T]: every eighth of kNibbleStride integers from the T-th on, -8 to 7 or 0 to 15.
template <bool kSigned>
inline void store_strided_nibbles(void* p, const I32 (&q)[8]) {
    const auto merge = [](I32 low, I32 high, int bits) {  // the lowest `bits` bits of one, above them the other's
        return _mm512_ternarylogic_epi32(splat_int((1 << bits) - 1), low, _mm512_slli_epi32(high, bits), 0xca);
    };
    const I32 low = merge(merge(q[0], q[1], 4), merge(q[2], q[3], 4), 8);
    const I32 high = merge(merge(q[4], q[5], 4), merge(q[6], q[7], 4), 8);
    const I32 all = merge(low, high, 16);
    _mm512_storeu_si512(p, kSigned ? _mm512_xor_si512(all, splat_int(int(0x88888888u))) : all);  // plus 8 in each half byte
}

// kStreamAlign bytes past the caches.
inline void stream_line(const void* from, void* to) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}

using Mask = __mmask16;
inline Mask not_negative(F32 x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline std::uint64_t mask_bits(Mask m) { return m; }
inline Mask bits_mask(std::uint64_t bits) { return Mask(bits); }
inline F32 choose(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }

}  // namespace
